"""Model cards: README.md of a written folder, in the format of Hugging Face's hub.

A card states what files prove: the configuration, the checkpoint's run, the base's own card. It guesses nothing.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig
from fm9g.config.model import ModelConfig
from fm9g.convert.native_tokenizer import AUTO_TOKENIZER
from fm9g.convert.source import Source
from fm9g.data.encode.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, tokenizer_files
from fm9g.io.inputs import register_input
from fm9g.io.json_file import read_object
from fm9g.lora.adapter_file import Adapter
from fm9g.model.transformer import weight_shapes

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENSE = re.compile(r"^(license|license_name|license_link): *([^\s#'\"\[\]{}]+) *$", re.MULTILINE)
_CHAT = """messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_COMPLETION = """inputs = tokenizer("The", return_tensors="pt")
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


@dataclass(frozen=True)
class ModelUse:
    """How a written folder is loaded.

    Args:
        loads_as: the transformers class, or the model_type of the reference whose code loads it.
        needs_code: whether that is code in the folder (trust_remote_code).
        tokenizer_class: the transformers class that opens the tokenizer.
    """

    loads_as: str
    needs_code: bool = False
    tokenizer_class: str = AUTO_TOKENIZER


def model_card(source: Source, folder: Path, name: str, use: ModelUse) -> str:
    """The text of a model's README.md.

    Args:
        folder: holds the tokenizer already.
        name: the folder's final name.
    """
    run = _RunMetadata(source.checkpoint) if source.checkpoint else None
    adapter, config = source.adapter, source.config
    # A merge knows the run that trained the adapter, or only that of the base.
    of_base = run is not None and adapter is not None and not (run.folder / ADAPTER_CONFIG).is_file()
    base = source.base or (run.base if run else None)
    trained_from_scratch = run is not None and run.is_new and not (config.qkv_bias or config.qk_norm)
    nine_g = source.reference_config.get("model_type") == "fm9g" or (_is_9g(base) if base else trained_from_scratch)
    title = " ".join(name.split())
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"} | (_base_keys(base) if base else {})
    kind = "A 9G language model" if nine_g else "A language model"
    sections = [
        _front_matter(head, ["fm9g", "causal-lm"] if nine_g else ["causal-lm"]),
        f"# {title}",
        " ".join([f"{kind}, exported by fm9g.", *_origin(base, adapter, run), f"It loads as `{use.loads_as}`."]),
        _table("Configuration", _configuration(config)),
    ]
    if adapter:
        trained_by = None if of_base else run
        base_name = (_hub_name(base) or _title(base)) if base else ""
        sections.append(_table("Adapter", _adapter_rows(adapter, trained_by, base_name, adapter.layers)))
    if run:
        sections += run.sections(" of the base" if of_base else "", adapter is not None)
    sections.append("## Use\n\n" + _use(folder, title, use))
    return "\n\n".join(sections) + "\n"


def peft_card(adapter: Adapter, name: str, base: str, modules: Iterable[str]) -> str:
    """The text of README.md of an adapter in PEFT's layout.

    Args:
        name: of its folder.
        base: named as the base in its configuration; empty: unknown.
        modules: full names in PEFT's layout of the layers with an adapter.
    """
    config, run = adapter.config, _run_in(adapter.path.parent)
    local = Path(base) if base and Path(base).exists() else None
    hub = _hub_name(local) if local else ""
    # A run of ours records a path, which may look like a name on a hub.
    if not local and not (config.base_sha256 and base == config.base) and HUB_NAME.fullmatch(base):
        hub = base
    loads = base if _is_hf_folder(local) else hub
    head = {"base_model": hub} if hub else {}
    head |= {"library_name": "peft", "pipeline_tag": "text-generation"} | (_license_keys(local) if local else {})
    layers = sorted({module.rpartition(".")[2] for module in modules})
    title, base_name = " ".join(name.split()), hub or (_title(Path(base)) if base else "")
    sections = [
        _front_matter(head, ["lora", "transformers"]),
        f"# {title}",
        f"An adapter for {base_name or 'a language model'}, exported by fm9g: "
        f"{_kind(config)} of rank {_rank(config)} and alpha {_alpha(config):g}.",
        _table("Adapter", _adapter_rows(config, run, base_name, layers)),
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
        f"tokenizer = {AUTO_TOKENIZER}.from_pretrained({_literal(title) if adapter.tokenizer else 'base'})",
        "model = AutoModelForCausalLM.from_pretrained(base)",
        *_resize(adapter),
        f"model = PeftModel.from_pretrained(model, {_literal(title)})",
        _CHAT if chat else _COMPLETION,
    ]
    sections.append("## Use\n\n" + _block("python", *lines))
    return "\n\n".join(sections) + "\n"


def _resize(adapter: Adapter) -> Iterator[str]:
    """The line that gives the base the adapter's number of token ids."""
    if rows := adapter.vocab_size(0):
        yield f"model.resize_token_embeddings({rows}, mean_resizing=False)  # the adapter's number of token ids"


class _RunMetadata:
    """Configuration, progress and data of the run that saved a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self._checkpoint = checkpoint.folder, checkpoint
        self._config, self._trainer_state = checkpoint.run_config(), checkpoint.trainer_state()
        self._datasets = checkpoint.loader_state().get("fingerprint", {}).get("datasets", {})

    def value(self, key: str, section: str = "train") -> Any:
        item = self._config.get(section, {}).get(key)
        return item.get("value") if isinstance(item, dict) else None

    @property
    def base(self) -> Path | None:
        """The model that training started from; None: unknown, or new weights."""
        given = self.value("pretrained_model")
        return Path(given) if given else None

    @property
    def is_new(self) -> bool:
        """Whether the weights were initialized at step 0.

        Earlier versions did not record the base of a resumed run; their runs without a base count only if they have
        the key `adapter`, which is newer, or never resumed.
        """
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
            template, records = self.value("chat_template", f"data.{task}"), self._datasets.get(task, {}).get("records")
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


def _adapter_rows(
    config: AdapterConfig, run: _RunMetadata | None, base: str, layers: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """run: that trained the adapter. base: its name."""
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
    if config.modules_to_save:
        yield "complete weights", ", ".join(config.modules_to_save)
    if config.made_from:
        yield "weighted sum of", f"{len(config.made_from)} adapters"
    if run and (started := run.value("adapter")):
        yield "started from the adapter", _title(Path(started))


def _kind(config: AdapterConfig) -> str:
    return "DoRA" if config.dora else "rsLoRA" if config.rslora else "LoRA"


def _rank(config: AdapterConfig) -> int:
    """The rank in training; a PiSSA adapter has twice as many in its file."""
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


def _use(folder: Path, title: str, use: ModelUse) -> str:
    opener = use.tokenizer_class
    code = ", trust_remote_code=True" if use.needs_code else ""
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
    if use.needs_code or opener != AUTO_TOKENIZER:  # vLLM opens tokenizers with AutoTokenizer alone
        return text
    return f"{text}\n\nvLLM serves it:\n\n" + _block("shell", f"vllm serve {shlex.quote(title)}")


def _chat_template(folder: Path) -> str:
    """The chat template of a folder's tokenizer; empty: none."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8-sig")
    settings = read_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""


def _title(path: Path) -> str:
    """The name of a file or folder without its parents, which mean nothing on another machine."""
    if path.name.isdecimal() and path.parent.name:
        return f"checkpoint {path.name} of {path.parent.name}"
    return path.name


def _base_keys(base: Path) -> dict[str, str]:
    hub = _hub_name(base)
    return ({"base_model": hub} if hub else {}) | _license_keys(base)


def _license_keys(base: Path) -> dict[str, str]:
    """The licence keys of the base's own card."""
    card = base / "README.md"
    if not card.is_file():
        return {}
    register_input(card)
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    keys = dict(_LICENSE.findall(head[1])) if head else {}
    return keys if "license" in keys else {}


def _is_hf_folder(path: Path | None) -> bool:
    return path is not None and (path / "config.json").is_file() and not (path / MANIFEST).is_file()


def _hub_name(base: Path) -> str:
    """The hub name (ORG/NAME) of a local base, from its configuration; empty: unknown."""
    name = str(read_object(base / "config.json").get("_name_or_path", "")) if _is_hf_folder(base) else ""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else ""


def _is_9g(path: Path) -> bool:
    """Whether a local model is certainly a 9G one: by its model_type, or trained from scratch without biases or norms.

    Follows the bases of its runs.
    """
    if _is_hf_folder(path):
        return bool(read_object(path / "config.json").get("model_type") == "fm9g")
    run = _run_in(path if path.is_dir() else path.parent)
    if run is None:
        return False
    if run.base:
        return _is_9g(run.base)
    return run.is_new and not any(run.value(key, "model") for key in ("qkv_bias", "qk_norm"))


def _run_in(folder: Path) -> _RunMetadata | None:
    """The run of a checkpoint; None if the folder is none."""
    if not (folder / MANIFEST).is_file():
        return None
    return _RunMetadata(Checkpoint(folder, checksums=False, needs_optimizer=False))


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
