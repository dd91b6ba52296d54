"""Model cards: README.md of a written folder, as Hugging Face's hub reads it. They say what is known, and no more."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.checkpoint.checkpoint import MANIFEST, Checkpoint
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig
from fm9g.config.load import read_object
from fm9g.config.model import ModelConfig
from fm9g.convert.native_tokenizer import AUTO_TOKENIZER
from fm9g.data.encode.tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, tokenizer_files
from fm9g.io.inputs import register_input
from fm9g.model.transformer import weight_shapes

if TYPE_CHECKING:
    from fm9g.convert.hf import ExportSource
    from fm9g.lora.adapter_file import Adapter

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENSE = re.compile(r"^(license|license_name|license_link): *([^\s#'\"\[\]{}]+) *$", re.MULTILINE)
_CHAT = """messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_COMPLETION = """inputs = tokenizer("The", return_tensors="pt")
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def model_card(
    model: ExportSource, folder: Path, name: str, loads_as: str, reference: Path | None, needs_code: bool, opener: str
) -> str:
    """The text of README.md of a model.

    folder: it holds the tokenizer already. name: its own, when it is complete. loads_as: the transformers class, or the
    reference's model_type. opener: the class that opens the tokenizer.
    """
    checkpoint = Checkpoint(model.folder, checksums=False, needs_optimizer=False) if model.folder else None
    run = _RunMetadata(checkpoint) if checkpoint else None
    adapter = model.adapter
    # A merge knows the run that trained the adapter, or only that of the base.
    of_base = run is not None and adapter is not None and not (run.folder / ADAPTER_CONFIG).is_file()
    base = model.base or (run.base if run else None)
    new = run is not None and run.is_new and not (model.config.qkv_bias or model.config.qk_norm)  # and no import's
    nine_g = _type_of(reference) == "fm9g" or (_is_9g(base) if base else new)
    title = " ".join(name.split())
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"} | (_base_keys(base) if base else {})
    kind = "A 9G language model" if nine_g else "A language model"
    sections = [
        _front_matter(head, ["fm9g", "causal-lm"] if nine_g else ["causal-lm"]),
        f"# {title}",
        " ".join([f"{kind}, exported by fm9g.", *_origin(base, adapter, run), f"It loads as `{loads_as}`."]),
        _table("Configuration", _configuration(model.config)),
    ]
    if adapter:
        trained_by = None if of_base else run
        named = (_hub_name(base) or _title(base)) if base else ""
        sections.append(_table("Adapter", _adapter(adapter, trained_by, named, adapter.layers)))
    if run:
        sections += run.sections(" of the base" if of_base else "", adapter is not None)
    sections.append("## Use\n\n" + _use(folder, title, needs_code, opener))
    return "\n\n".join(sections) + "\n"


def peft_card(adapter: Adapter, name: str, base: str, modules: Iterable[str]) -> str:
    """The text of README.md of an adapter in PEFT's layout.

    name: of its folder. base: what its configuration names as the base; empty: not known. modules: their names there.
    """
    config, folder = adapter.config, adapter.path.parent
    run = (
        _RunMetadata(Checkpoint(folder, checksums=False, needs_optimizer=False))
        if (folder / MANIFEST).is_file()
        else None
    )
    local = Path(base) if base and Path(base).exists() else None
    hub = _hub_name(local) if local else ""
    # A run of ours records a path, which may look like a name on a hub.
    if not local and not (config.base_sha256 and base == config.base) and HUB_NAME.fullmatch(base):
        hub = base
    loads = base if _is_folder(local) else hub
    head = {"base_model": hub} if hub else {}
    head |= {"library_name": "peft", "pipeline_tag": "text-generation"} | (_license_keys(local) if local else {})
    title, named = " ".join(name.split()), hub or (_title(Path(base)) if base else "")
    sections = [
        _front_matter(head, ["lora", "transformers"]),
        f"# {title}",
        f"An adapter for {named or 'a language model'}, exported by fm9g: "
        f"{_kind(config)} of rank {_rank(config)} and alpha {_alpha(config):g}.",
        _table("Adapter", _adapter(config, run, named, sorted({module.rpartition(".")[2] for module in modules}))),
    ]
    if run:
        sections += run.sections("", True)
    chat = (run is None or run.value("chat_template") == "tokenizer") and (local is None or bool(_chat_template(local)))
    chat &= bool(run or local)
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, {AUTO_TOKENIZER}",
        "",
        f"base = {_literal(loads)}" if loads else 'base = "..."  # the Hugging Face folder of the base',
        f"tokenizer = {AUTO_TOKENIZER}.from_pretrained(base)",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {_literal(title)})",
        _CHAT if chat else _COMPLETION,
    ]
    sections.append("## Use\n\n" + _block("python", *lines))
    return "\n\n".join(sections) + "\n"


class _RunMetadata:
    """What a checkpoint knows of its run."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self._checkpoint = checkpoint.folder, checkpoint
        self._config, self._trainer_state = checkpoint.run_config(), checkpoint.trainer_state()
        position = checkpoint.loader_state()
        self._records = position.get("fingerprint", {}).get("datasets", {})

    def value(self, key: str, section: str = "train") -> Any:
        item = self._config.get(section, {}).get(key)
        return item.get("value") if isinstance(item, dict) else None

    @property
    def base(self) -> Path | None:
        """What it was trained from, if that is known."""
        given = self.value("pretrained_model")
        return Path(given) if given else None

    @property
    def is_new(self) -> bool:
        """Whether its weights were new at step 0. Runs of earlier versions forgot their base when they resumed."""
        return self.value("pretrained_model") == "" and (
            self.value("adapter") is not None or not self.value("resume_ckpt")
        )

    def sections(self, of: str, with_adapter: bool) -> Iterator[str]:
        yield _table(f"Training{of}", self._training(with_adapter))
        if rows := list(self._data()):
            header = ("data set", "tokens", "share", "template", "records")
            yield f"## Data{of}\n\n" + "\n".join(_row(row) for row in [header, ("---",) * 5, *rows])

    def _training(self, with_adapter: bool) -> Iterator[tuple[str, Any]]:
        if not with_adapter and (self.base or self.is_new):
            yield "method", "full finetuning" if self.base else "training from scratch"
        yield "step", f"{self._checkpoint.step:,}"
        if isinstance(tokens := self._trainer_state.get("global_token_pass"), int):
            yield "tokens", f"{tokens:,}"
        for key in ("loss", "val_loss"):
            if isinstance(value := self._trainer_state.get(key), (int, float)):
                yield key, f"{value:.4f}"
        for key in ("model_unique", "optimizer", "lr", "lr_scheduler", "batch_size", "max_length", "freeze"):
            if (value := self.value(key)) not in (None, ""):
                yield key, value
        if template := self.value("chat_template"):
            yield "chat template", "the tokenizer's own" if template == "tokenizer" else _title(Path(template))

    def _data(self) -> Iterator[tuple[str, ...]]:
        tokens = self._trainer_state.get("global_total_task_token")
        tokens = tokens if isinstance(tokens, dict) else {}
        total = sum(tokens.values())
        for task, count in tokens.items():
            share = f"{count / total:.2%}" if total else ""
            template, records = self.value("chat_template", f"data.{task}"), self._records.get(task, {}).get("records")
            yield (
                task,
                f"{count:,}",
                share,
                _title(Path(template)) if template else "",
                f"{records:,}" if records is not None else "",
            )


def _origin(base: Path | None, adapter: AdapterConfig | None, run: _RunMetadata | None) -> Iterator[str]:
    if base and adapter:
        how = f"a {_kind(adapter)} adapter (rank {_rank(adapter)}, alpha {_alpha(adapter):g})"
        yield f"It is {_title(base)} with {how} merged into its weights."
    elif base:
        yield f"It was finetuned from {_title(base)}."
    elif run and run.is_new:
        yield "It was trained from scratch."


def _adapter(
    config: AdapterConfig, run: _RunMetadata | None, base: str, layers: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """run: the one that trained it. base: its name."""
    if base:
        yield "base model", base
    if config.base_sha256:
        yield "SHA-256 of the base's weights", config.base_sha256
    bits = run.value("quantization") if run else None
    on = f" on a base quantized to {bits} (QLoRA)" if bits not in (None, "none") else ""
    yield "method", _kind(config) + on + (", started as PiSSA" if config.pissa else "")
    yield "rank", f"{_rank(config)}" + (f" ({config.r} in the file)" if config.pissa else "")
    yield "alpha", f"{_alpha(config):g}" + (f" ({config.alpha:g} in the file)" if config.pissa else "")
    yield "layers", ", ".join(layers)
    if config.made_from:
        yield "weighted sum of", f"{len(config.made_from)} adapters"
    if run and (started := run.value("adapter")):
        yield "started from the adapter", _title(Path(started))


def _kind(config: AdapterConfig) -> str:
    return "DoRA" if config.dora else "rsLoRA" if config.rslora else "LoRA"


def _rank(config: AdapterConfig) -> int:
    """As trained: with PiSSA the file has twice the ranks."""
    return config.r // 2 if config.pissa else config.r


def _alpha(config: AdapterConfig) -> float:
    rank = _rank(config)
    return config.scaling * (math.sqrt(rank) if config.rslora else rank) if config.pissa else config.alpha


def _configuration(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    total = sum(shape.numel() for shape in weight_shapes(config).values())
    yield "parameters", f"{total:,}"
    yield "vocabulary", f"{config.vocab_size:,}"
    yield "layers", config.num_layers
    yield "hidden size", config.hidden_size
    yield "feed-forward size", config.intermediate_size
    yield "heads, of queries and of keys", f"{config.num_heads}, {config.num_kv_heads} of width {config.head_dim}"
    yield "longest text", f"{config.max_length:,} tokens"
    stretch = f", {config.rope_scaling} by {config.rope_factor:g}" if config.rope_scaling else ""
    yield "rotary base", f"{config.rope_theta:g}{stretch}"
    yield "output weights", "the embedding's" if config.tie_word_embeddings else "their own"


def _use(folder: Path, title: str, needs_code: bool, opener: str) -> str:
    code = ", trust_remote_code=True" if needs_code else ""
    load = f"AutoModelForCausalLM.from_pretrained({_literal(title)}{code})"
    if not tokenizer_files(folder):
        lines = ["from transformers import AutoModelForCausalLM", "", f"model = {load}"]
        return _block("python", *lines) + "\n\nThe folder holds no tokenizer."
    lines = [
        f"from transformers import AutoModelForCausalLM, {opener}",
        "",
        f"tokenizer = {opener}.from_pretrained({_literal(title)}{code})",
        f"model = {load}",
        _CHAT if _chat_template(folder) else _COMPLETION,
    ]
    text = _block("python", *lines)
    if needs_code or opener != AUTO_TOKENIZER:  # vLLM opens tokenizers by AutoTokenizer
        return text
    return f"{text}\n\nvLLM serves it:\n\n" + _block("shell", f"vllm serve {shlex.quote(title)}")


def _chat_template(folder: Path) -> str:
    """The chat template of a folder's tokenizer; empty: it has none."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8-sig")
    settings = read_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""


def _title(path: Path) -> str:
    """How a reader knows a file or folder, without the folders of the machine that it was on."""
    if path.name.isdecimal() and path.parent.name:
        return f"checkpoint {path.name} of {path.parent.name}"
    return path.name


def _base_keys(base: Path) -> dict[str, str]:
    hub = _hub_name(base)
    return ({"base_model": hub} if hub else {}) | _license_keys(base)


def _license_keys(base: Path) -> dict[str, str]:
    """What the card of a base says of its licence."""
    card = base / "README.md"
    if not card.is_file():
        return {}
    register_input(card)
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = dict(_LICENSE.findall(head[1])) if head else {}
    return found if "license" in found else {}


def _is_folder(path: Path | None) -> bool:
    """Whether it is a Hugging Face folder."""
    return path is not None and (path / "config.json").is_file() and not (path / MANIFEST).is_file()


def _hub_name(base: Path) -> str:
    """The name on a hub of a base that is here, which its configuration may tell; empty: not known."""
    name = str(read_object(base / "config.json").get("_name_or_path", "")) if _is_folder(base) else ""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else ""


def _type_of(folder: Path | None) -> str:
    return str(read_object(folder / "config.json").get("model_type")) if folder and _is_folder(folder) else ""


def _is_9g(path: Path) -> bool:
    """Whether a model that is here is known to be a 9G one: by its type, or as trained from scratch in 9G's terms."""
    if _type_of(path):
        return _type_of(path) == "fm9g"
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        return False
    run = _RunMetadata(Checkpoint(folder, checksums=False, needs_optimizer=False))
    if run.base:
        return _is_9g(run.base)
    return run.is_new and not any(run.value(key, "model") for key in ("qkv_bias", "qk_norm"))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _front_matter(keys: Mapping[str, str], tags: list[str]) -> str:
    lines = [f"{key}: {value}" for key, value in keys.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _table(title: str, rows: Iterator[tuple[str, Any]]) -> str:
    return f"## {title}\n\n" + "\n".join(_row(row) for row in [("", ""), ("---", "---"), *rows])


def _row(cells: tuple[Any, ...]) -> str:
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"
