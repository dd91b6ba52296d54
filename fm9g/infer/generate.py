"""Text from a Hugging Face folder, by transformers alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.config.load import read_object
from fm9g.config.model import check_sizes
from fm9g.convert.families import FAMILIES
from fm9g.convert.hf_reader import check_weight_files
from fm9g.data.encode.encoder import stop_token_ids
from fm9g.data.encode.encoding_limits import panics_as_user_error
from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import TOKENIZER_CONFIG, as_id_list, load_tokenizer
from fm9g.errors import UserError, error_text
from fm9g.io.path_kind import MODEL, check_kind


def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 1234,
    chat: bool = False,
    system: str = "",
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of a prompt. temperature 0 takes the likeliest token each time.

    chat: the prompt is what a user says, and is put into the folder's chat template; system: what is said before it.
    on_text: gets the continuation as it is made, in pieces; before the first one an empty text.
    Raises UserError where the folder is not one that transformers loads.
    """
    folder = resolve_checkpoint_path(folder)
    _check_folder(folder)
    for name, value, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature == 0 or 0.001 <= temperature < math.inf),
        ("top_p", top_p, 0 < top_p <= 1),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf),
        ("seed", seed, 0 <= seed < 2**32),
    ):
        if not allowed:
            raise UserError(f"{name}: found {value}, which is out of range")
    if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("prompt: not UTF-8")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from fm9g.engine.fsdp import has_fast_bf16

    if system and not chat:
        raise UserError("system: goes with a chat (--chat)")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of a report of many lines about weights, which is told below in one
    check_weight_files(folder)  # transformers says how to run code in them
    config = _config(folder)
    tokenizer = _open_tokenizer(folder, config)
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
        print(f"note: {folder}: {min(unexpected)} has no place in the model of config.json", file=sys.stderr)
    _check_special_ids(folder, model.generation_config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = device.type == "cuda" or (model.dtype == torch.bfloat16 and has_fast_bf16(device))
    if not fast:
        model.float()
    model.eval().to(device)
    torch.manual_seed(seed)
    stop_ids = list(
        dict.fromkeys([*as_id_list(model.generation_config.eos_token_id), *as_id_list(model.config.eos_token_id)])
    )
    if chat:
        own_tokenizer = load_tokenizer(folder)
        if not own_tokenizer.chat_template:
            raise UserError(f"{folder}: has no chat template; leave --chat away, or take a folder that has one")
        template = Template(f"of {folder}", own_tokenizer.chat_template, own_tokenizer.special_tokens)
        messages = [{"role": "system", "content": system}] if system else []
        prompt = template.render([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
        stop_ids = list(dict.fromkeys([*stop_ids, *stop_token_ids(own_tokenizer, template)]))
    ids = _prompt_ids(tokenizer, prompt, chat)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    inputs = torch.tensor([ids], device=device)
    streamer = _TextStreamer(tokenizer, on_text) if on_text else None
    pad_ids = [tokenizer.pad_token_id, *as_id_list(model.generation_config.pad_token_id), *stop_ids, 0]
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=stop_ids or None,
        pad_token_id=next(pad for pad in pad_ids if pad is not None and pad >= 0),
        streamer=streamer,
        **sampling,
    )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _check_special_ids(folder: Path, config: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if not all(type(token) is int for token in as_id_list(value)):
            raise UserError(
                f"{folder}/generation_config.json: {name}: found {value!r}, expected a token id or a list of them"
            )


class _TextStreamer:
    """A streamer of transformers: hands on the text of tokens as soon as it cannot change any more."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None
        self._start = self._emitted = 0  # the tokens before `_start` are forgotten; those before `_emitted` are told

    def put(self, value: Any) -> None:
        """value: at first the ids of the prompt, then a token at a time."""
        if self._ids is None:
            self._ids = []
            self._on_text("")
            return
        self._ids += value.reshape(-1).tolist()
        self._emit()

    def end(self) -> None:
        self._emit(last=True)

    def _emit(self, last: bool = False) -> None:
        # The text of a token depends on those before it (spaces), and a character may be several tokens.
        ids = self._ids or []
        before = self._decode(ids[self._start : self._emitted])
        text = self._decode(ids[self._start :])
        if len(text) > len(before) and (last or not text.endswith("\ufffd")):
            self._on_text(text[len(before) :])
            self._start, self._emitted = self._emitted, len(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _check_folder(folder: Path) -> None:
    """Raises UserError where transformers has no class for it, with what makes a folder that it has one for."""
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder, which `fm9g convert` makes")
    check_kind(folder, MODEL)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (config.json is missing); make one with `fm9g convert`")
    config = read_object(folder / "config.json")
    check_sizes(config, str(folder / "config.json"))
    kind = config.get("model_type")
    if kind is None or "dim_model" in config:
        raise UserError(
            f"{folder}: not a Hugging Face folder (its config.json is not one of transformers); of a 9G model's .pt "
            "file, `fm9g convert FILE.pt FOLDER` makes one"
        )
    from transformers import CONFIG_MAPPING

    if "auto_map" in config and kind not in CONFIG_MAPPING:
        there_and_back = f"`fm9g convert {folder} m.pt` and `fm9g convert m.pt FOLDER --reference {folder}`"
        known = (
            f"{there_and_back} write it for a class of transformers" if kind in FAMILIES else "it is of no known family"
        )
        raise UserError(f"{folder}: its model ({kind}) is code that lies there, which is not run; {known}")


def _config(folder: Path) -> Any:
    """config.json, as transformers has it. Of several tokens that begin a text, which it does not take, the first."""
    from transformers import AutoConfig

    content = read_object(folder / "config.json")
    try:
        if not isinstance(content.get("bos_token_id"), list):
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        content["bos_token_id"] = next(iter(content["bos_token_id"]), None)
        return AutoConfig.for_model(**content)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error_text(error)}") from None


def _open_tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer of a folder. config: its model's. Raises UserError."""
    import transformers

    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    name = str(settings.get("tokenizer_class"))
    # For some kinds of models AutoTokenizer takes another class than the one that is named, to other ids.
    as_named = (folder / "tokenizer.json").is_file() and name in ("PreTrainedTokenizerFast", "TokenizersBackend")
    kind = getattr(transformers, name if as_named else "AutoTokenizer")
    try:
        named = {} if as_named else {"config": config}
        with panics_as_user_error(folder):
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **named)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds
        if "auto_map" in settings:
            raise UserError(
                f"{folder}: its tokenizer ({name}) is code that lies there, which is not run; put a tokenizer.json in "
                "its place, which a fast tokenizer's save_pretrained writes"
            ) from None
        raise UserError(f"{folder}: transformers cannot load its tokenizer: {error_text(error)}") from None


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The ids that a generation starts from: those of the prompt, begun as the tokenizer begins a text, and not ended.

    Raises UserError where there is no token to start from.
    """
    with panics_as_user_error("the tokenizer"):
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not chat and ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # a tokenizer that ends each text (add_eos_token)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("prompt: it is empty, and the tokenizer has no token that begins a text; give a word at least")
    return ids
