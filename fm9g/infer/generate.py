"""Text from a Hugging Face folder, by transformers alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.config.model import check_sizes
from fm9g.convert.families import FAMILIES
from fm9g.convert.hf_reader import check_weight_files
from fm9g.data.encode.encoding_limits import panics_as_user_error
from fm9g.data.encode.stop_tokens import stop_token_ids
from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import as_id_list
from fm9g.data.encode.tokenizer_files import TOKENIZER_CONFIG
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError, error_text
from fm9g.io.json_file import read_object
from fm9g.path_kind import MODEL, check_kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationOptions:
    """How a continuation is generated. Raises UserError for a value out of range.

    Args:
        max_new_tokens: maximum length of the continuation.
        temperature: 0 takes the likeliest token each time.
        top_p: samples from the likeliest tokens whose probabilities sum to this.
        repetition_penalty: above 1 discourages repeats.
        chat: the prompt is a user's message, and goes into the folder's chat template.
        system: the system message before it.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    chat: bool = False
    system: str = ""

    def __post_init__(self) -> None:
        in_range = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or 0.001 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "seed": 0 <= self.seed < 2**32,
        }
        for name, allowed in in_range.items():
            if not allowed:
                raise UserError(f"{name}: found {getattr(self, name)}, which is out of range")
        if self.system and not self.chat:
            raise UserError("system: needs a chat (--chat)")


def generate(
    folder: Path,
    prompt: str,
    options: GenerationOptions = GenerationOptions(),
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of a prompt.

    Args:
        folder: a Hugging Face folder.
        on_text: receives the continuation in pieces while it is generated; before the first one an empty text.

    Raises:
        UserError: transformers cannot load the folder.
    """
    folder = resolve_checkpoint_path(folder)
    _check_folder(folder)
    if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("prompt: not UTF-8")
    import torch

    check_weight_files(folder)  # the message of transformers says how to run code in them
    config = _load_config(folder)
    tokenizer = open_hf_tokenizer(folder, config)
    model = _load_model(folder, config)
    torch.manual_seed(options.seed)
    stop_ids = [*as_id_list(model.generation_config.eos_token_id), *as_id_list(model.config.eos_token_id)]
    if options.chat:
        prompt, turn_ends = _render_chat(folder, prompt, options.system)
        stop_ids += turn_ends
    ids = prompt_ids(tokenizer, prompt, options.chat)
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        streamer=_TextStreamer(tokenizer, on_text) if on_text else None,
        **_generation_kwargs(options, list(dict.fromkeys(stop_ids)), tokenizer, model),
    )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _generation_kwargs(options: GenerationOptions, stop_ids: list[int], tokenizer: Any, model: Any) -> dict[str, Any]:
    """The arguments of transformers' generate()."""
    pad_ids = [tokenizer.pad_token_id, *as_id_list(model.generation_config.pad_token_id), *stop_ids, 0]
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    return {
        "max_new_tokens": options.max_new_tokens,
        "repetition_penalty": options.repetition_penalty,
        "eos_token_id": stop_ids or None,
        "pad_token_id": next(pad for pad in pad_ids if pad is not None and pad >= 0),
        **sampling,
    }


def _load_model(folder: Path, config: Any) -> Any:
    """The model on the GPU if there is one, in the type in which it computes fast there."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from fm9g.engine.fsdp import has_fast_bf16

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # hides its report on weights, many lines that we log as one
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
        model, report = loaded
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error_text(error)}") from None
    if missing := report["missing_keys"]:
        raise UserError(f"{folder}: {min(missing)} is missing; config.json and the weights do not match")
    if unexpected := report["unexpected_keys"]:
        logger.warning(f"{folder}: {min(unexpected)} has no place in the model of config.json")
    _check_special_ids(folder, model.generation_config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = device.type == "cuda" or (model.dtype == torch.bfloat16 and has_fast_bf16(device))
    if not fast:
        model.float()
    return model.eval().to(device)


def _check_special_ids(folder: Path, config: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if not all(type(token) is int for token in as_id_list(value)):
            raise UserError(
                f"{folder}/generation_config.json: {name}: found {value!r}, expected a token id or a list of them"
            )


def _render_chat(folder: Path, prompt: str, system: str) -> tuple[str, list[int]]:
    """A user's message in the folder's chat template, and the tokens that end the answer."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: has no chat template; leave out --chat, or take a folder that has one")
    template = Template(f"of {folder}", tokenizer.chat_template, tokenizer.special_tokens)
    messages = [{"role": "system", "content": system}] if system else []
    text = template.render([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
    return text, stop_token_ids(tokenizer, template)


class _TextStreamer:
    """A streamer of transformers that passes on the text of tokens as soon as later tokens cannot change it.

    ids:   [ forgotten | start .. emitted | emitted .. ]
                         context            not passed on yet
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None
        self._start = self._emitted = 0

    def put(self, value: Any) -> None:
        """value: the ids of the prompt first, then one token per call."""
        if self._ids is None:
            self._ids = []
            self._on_text("")
            return
        self._ids += value.reshape(-1).tolist()
        self._emit()

    def end(self) -> None:
        self._emit(last=True)

    def _emit(self, last: bool = False) -> None:
        # The text of a token depends on the one before it (spaces), and a character may take several tokens.
        ids = self._ids or []
        before = self._decode(ids[self._start : self._emitted])
        text = self._decode(ids[self._start :])
        if len(text) > len(before) and (last or not text.endswith("\ufffd")):
            self._on_text(text[len(before) :])
            self._start, self._emitted = self._emitted, len(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _check_folder(folder: Path) -> None:
    """Raises UserError if transformers has no class for the folder; the message names the command that makes one."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder, which `fm9g convert` writes")
    check_kind(folder, MODEL)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (config.json is missing); write one with `fm9g convert`")
    config = read_object(folder / "config.json")
    check_sizes(config, str(folder / "config.json"))
    kind = config.get("model_type")
    if kind is None or "dim_model" in config:
        raise UserError(
            f"{folder}: not a Hugging Face folder (its config.json is not one of transformers); `fm9g convert FILE.pt "
            "FOLDER` converts a 9G model's .pt file to one"
        )
    from transformers import CONFIG_MAPPING

    if "auto_map" in config and kind not in CONFIG_MAPPING:
        there_and_back = f"`fm9g convert {folder} m.pt` and `fm9g convert m.pt FOLDER --reference {folder}`"
        known = (
            f"{there_and_back} write it for a class of transformers" if kind in FAMILIES else "its family is unknown"
        )
        raise UserError(f"{folder}: its model ({kind}) is code in the folder, which fm9g does not run; {known}")


def _load_config(folder: Path) -> Any:
    """config.json as transformers' object. Of several tokens that start a text, which it does not take, the first."""
    from transformers import AutoConfig

    content = read_object(folder / "config.json")
    try:
        if not isinstance(content.get("bos_token_id"), list):
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        content["bos_token_id"] = next(iter(content["bos_token_id"]), None)
        return AutoConfig.for_model(**content)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error_text(error)}") from None


def open_hf_tokenizer(folder: Path, config: Any) -> Any:
    """A folder's tokenizer as transformers' object. config: of the folder's model."""
    import transformers

    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    name = str(settings.get("tokenizer_class"))
    # For some kinds of models AutoTokenizer takes another class than the named one, which gives other ids.
    as_named = (folder / "tokenizer.json").is_file() and name in ("PreTrainedTokenizerFast", "TokenizersBackend")
    kind = getattr(transformers, name if as_named else "AutoTokenizer")
    try:
        kwargs = {} if as_named else {"config": config}
        with panics_as_user_error(folder):
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kwargs)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds
        if "auto_map" in settings:
            raise UserError(
                f"{folder}: its tokenizer ({name}) is code in the folder, which fm9g does not run; replace it by a "
                "tokenizer.json, which a fast tokenizer's save_pretrained writes"
            ) from None
        raise UserError(f"{folder}: transformers cannot load its tokenizer: {error_text(error)}") from None


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The token ids that a generation starts from: begun as the tokenizer begins a text, but not ended.

    Raises UserError if there is none.
    """
    with panics_as_user_error("the tokenizer"):
        ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not chat and ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # a tokenizer that ends each text (add_eos_token)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("prompt: it is empty, and the tokenizer has no token that starts a text; give at least a word")
    return ids
