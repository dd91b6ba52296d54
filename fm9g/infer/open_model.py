"""Opens whatever can be trained or was trained here as a model of transformers: nothing is converted by hand.

Hugging Face folder           ──────────────────────────────> its class of transformers
checkpoint or .pt file of 9G  ── names mapped in memory ────> its class of transformers
adapter                       ── its base as above, and ────> PEFT, unmerged
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.checkpoint.layout import BEST, LAST, MANIFEST
from fm9g.config.registry import find_model
from fm9g.convert.families import FAMILIES, to_hf_weights
from fm9g.convert.hf_export import write_native_files
from fm9g.convert.hf_reader import main_dtype
from fm9g.convert.source import Source, open_source
from fm9g.data.encode.tokenizer import as_id_list
from fm9g.data.encode.tokenizer_files import tokenizer_files
from fm9g.errors import UserError
from fm9g.infer.adapters import AdapterSet, as_peft, base_of, is_adapter, own_tokenizer
from fm9g.infer.hf_folder import OpenOptions, check_hf_folder, load_hf_config, load_hf_model, needs_mapping
from fm9g.infer.options import GenerationOptions
from fm9g.infer.prompts import Messages, Prompts
from fm9g.io.lazy_tensor import LazyConcat
from fm9g.shorthand.model import describe_model

if TYPE_CHECKING:
    import torch


class LoadedModel:
    """A model in memory that generates.

    Args:
        name: its folder's.
        model: of transformers, with the layers of adapters in it.
        prompts: name of an adapter -> how its prompts become tokens; empty: of the model without any.
        adapters: None: there are none.
        temporary: a folder that the model needs as long as it lives.

    Attributes:
        max_model_len: maximum of prompt and continuation together, in tokens.
        sampling: the options that its generation_config.json recommends.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        prompts: Mapping[str, Prompts],
        adapters: AdapterSet | None,
        temporary: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.name, self.model, self._prompts = name, model, prompts
        self._adapters, self._temporary = adapters, temporary
        self.sampling = _take_sampling(model)
        self.max_model_len = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return self._adapters.names if self._adapters else ()

    @property
    def adapter(self) -> str:
        """The active adapter; empty: none."""
        return self._adapters.active if self._adapters else ""

    def use_adapter(self, name: str) -> None:
        """Switches to an adapter; empty: to the model without any. Raises UserError if there is no such adapter."""
        if name and name not in self.adapters:
            raise UserError(f"adapter {name}: unknown; there are: {', '.join(self.adapters) or 'none'}")
        if self._adapters:
            self._adapters.use(name)

    @property
    def prompts(self) -> Prompts:
        """How prompts become tokens, for the active adapter."""
        return self.prompts_of(self.adapter)

    def prompts_of(self, adapter: str) -> Prompts:
        """How prompts become tokens for an adapter; empty: for the model without any."""
        return self._prompts[adapter]

    def generate(
        self,
        prompt: str | Messages,
        options: GenerationOptions = GenerationOptions(),
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The continuation of a text, or the answer to a conversation, by the active adapter.

        Args:
            prompt: a text, or messages with role and content.
            on_text: receives the text in pieces while it is generated; before the first one an empty text.

        Raises UserError for messages if there is no chat template.
        """
        from fm9g.infer.generate import stream

        chat = not isinstance(prompt, str)
        ids = self.prompts.encode_chat(prompt) if not isinstance(prompt, str) else self.prompts.encode_text(prompt)
        parts = []
        if on_text:
            on_text("")
        for piece in stream(self, ids, replace(options, num_return_sequences=1), chat):
            parts.append(piece.text)
            if on_text and piece.text:
                on_text(piece.text)
        return "".join(parts)

    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """(T, V) scores of the token after each of the T token ids of a prompt."""
        import torch

        with torch.inference_mode():
            scores: torch.Tensor = self.model(torch.tensor([list(prompt)], device=self.model.device)).logits[0]
            return scores


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _take_sampling(model: Any) -> dict[str, Any]:
    """Takes the sampling options out of a model's generation settings, where generate() would add them to ours."""
    from transformers import GenerationConfig

    theirs = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    found = {name: getattr(theirs, name, None) for name in _SAMPLING}
    if not theirs.do_sample:
        found = {"temperature": 0.0 if theirs.do_sample is False else None} | {
            "repetition_penalty": found["repetition_penalty"]
        }
    return {name: value for name, value in found.items() if value is not None}


def open_model(
    path: str | Path, options: OpenOptions = OpenOptions(), adapters: Mapping[str, str | Path] | Sequence[str] = ()
) -> LoadedModel:
    """Opens a model for generation.

    Args:
        path: a Hugging Face folder, a checkpoint (its folder, RUN/STEP, RUN/best or RUN/last), a 9G .pt file with its
            .json, an adapter, whose base is opened too, a registered name, or ORG/NAME of a hub that was downloaded.
        adapters: further adapters: name -> path, or paths, which are named after their last part.

    Raises:
        UserError: there is no such model, or it cannot be opened.
    """
    found, template = locate(str(path))
    named = {short_name(str(path)): found} if is_adapter(found) else {}
    pairs = adapters.items() if isinstance(adapters, Mapping) else [(short_name(str(item)), item) for item in adapters]
    for name, adapter in pairs:
        if name in named:
            raise UserError(f"adapter {adapter}: another one is called {name}, too; give NAME=PATH")
        named[name] = locate(str(adapter))[0]
        if not is_adapter(named[name]):
            raise UserError(f"adapter {adapter}: is not an adapter (it has no adapter_config.json)")
    base, base_template = locate_base(found) if is_adapter(found) else (found, template)
    options = options if options.chat_template else replace(options, chat_template=base_template)
    temporary = tempfile.TemporaryDirectory(prefix="fm9g-")
    try:
        return _open(short_name(str(path)), base, options, named, temporary)
    except BaseException:
        temporary.cleanup()
        raise


def short_name(text: str) -> str:
    """What a model or an adapter is called after its path: the last part, for a checkpoint RUN-STEP."""
    path = Path(text)
    if path.name.isdecimal() or path.name in (BEST, LAST):
        path = Path(path.resolve()) if len(path.parts) < 2 else path
        return f"{path.parent.name}-{path.name}"
    return path.stem if path.suffix == ".pt" else path.name or path.resolve().name


def locate(text: str) -> tuple[Path, str]:
    """The path of a model or an adapter, and the chat template that a registered name stands for."""
    path = resolve_checkpoint_path(Path(text))
    if path.exists():
        return path, ""
    described = describe_model(text)
    if described.is_random:
        raise UserError(f"model: {text}: is a configuration without weights; give a trained model")
    keys = described.keys
    return Path(keys.get("adapter") or keys["pretrained_model"]), keys.get("chat_template", "") if find_model(
        text
    ) else ""


def locate_base(adapter: Path) -> tuple[Path, str]:
    """The model that an adapter belongs to, as in `locate`."""
    name = base_of(adapter)
    if not name:
        raise UserError(f"{adapter}: does not say which model it is for; give the model, and --adapter {adapter}")
    try:
        base, template = locate(name)
    except UserError as error:
        raise UserError(
            f"{adapter}: its model {name} is not there ({error}); give the model, and --adapter {adapter}"
        ) from None
    if is_adapter(base):
        raise UserError(f"{adapter}: its model {base} is an adapter, too; merge that one with `fm9g lora merge`")
    return base, template


def _open(
    name: str,
    base: Path,
    options: OpenOptions,
    adapters: Mapping[str, Path],
    temporary: tempfile.TemporaryDirectory[str],
) -> LoadedModel:
    folder, weights = _as_hf_folder(base, Path(temporary.name))
    config = load_hf_config(folder)
    model = load_hf_model(folder, config, options, weights)
    stop_ids = [*as_id_list(model.generation_config.eos_token_id), *as_id_list(config.eos_token_id)]

    def prompts_of(tokenizer: Path, name: str) -> Prompts:
        return Prompts(tokenizer, config, stop_ids, options.chat_template, name)

    prompts = {"": prompts_of(folder, str(base))}
    peft = {}
    for adapter, path in adapters.items():
        peft[adapter] = as_peft(path, Path(temporary.name))
        own = own_tokenizer(path, folder, Path(temporary.name))
        prompts[adapter] = prompts_of(own, str(path)) if own else prompts[""]
    return LoadedModel(name, model, prompts, AdapterSet(model, peft) if peft else None, temporary)


def is_hf_folder(path: Path) -> bool:
    """Whether transformers opens a path as it is. Raises UserError if nothing can open it."""
    if not path.is_dir() or (path / MANIFEST).is_file():
        return False
    check_hf_folder(path)
    return not needs_mapping(path)


def open_with_tokenizer(path: Path) -> Source:
    """A model that transformers does not open as it is. Raises UserError if it has no tokenizer."""
    source = open_source(path)
    if source.tokenizer is None and path.is_file():
        source = replace(source, tokenizer=path.parent)
    if source.tokenizer is None or not tokenizer_files(source.tokenizer):
        raise UserError(f"{path}: has no tokenizer; put the files of its tokenizer into {path.parent}")
    return source


def _as_hf_folder(path: Path, temporary: Path) -> tuple[Path, Mapping[str, LazyConcat] | None]:
    """A Hugging Face folder of the model, and its weights if they are not in the folder."""
    if is_hf_folder(path):
        return path, None
    source = open_with_tokenizer(path)
    folder = temporary / "model"
    folder.mkdir()
    weights = to_hf_weights(FAMILIES["llama"], source.config, source.weights)
    write_native_files(source, folder, str(main_dtype(weights)).removeprefix("torch."))
    return folder, weights
