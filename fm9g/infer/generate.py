"""Text from a Hugging Face folder, by transformers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fm9g.checkpoint.folder import MANIFEST
from fm9g.data.encode import stop_token_ids
from fm9g.data.template import load_template
from fm9g.data.tokenizer import load_tokenizer
from fm9g.errors import UserError


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
) -> str:
    """The continuation of a prompt. temperature 0 takes the likeliest token each time.

    chat: the prompt is what a user says, and is put into the folder's chat template; system: what is said before it.
    Raises UserError where the folder is not one that transformers loads.
    """
    _check_folder(folder)
    for name, value, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < math.inf),
        ("top_p", top_p, 0 < top_p <= 1),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf),
        ("seed", seed, 0 <= seed < 2**32),
    ):
        if not allowed:
            raise UserError(f"{name}: found {value}, which is out of range")
    if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("prompt: not UTF-8")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if system and not chat:
        raise UserError("system: goes with a chat (--chat)")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
        model, report = loaded
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None
    if missing := report["missing_keys"]:
        raise UserError(f"{folder}: {min(missing)} is missing; config.json and the weights do not match")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().to(device)
    torch.manual_seed(seed)
    stops = _as_list(model.generation_config.eos_token_id)
    if chat:
        ours = load_tokenizer(folder)
        template = load_template("tokenizer", ours)
        messages = [{"role": "system", "content": system}] if system else []
        prompt = template.render([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
        stops = list(dict.fromkeys([*stops, *stop_token_ids(ours, template)]))
    ids = _prompt_ids(tokenizer, prompt, chat)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    inputs = torch.tensor([ids], device=device)
    pads = [tokenizer.pad_token_id, *_as_list(model.generation_config.pad_token_id), *stops, 0]
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=next(pad for pad in pads if pad is not None),
        **sampling,
    )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _check_folder(folder: Path) -> None:
    """Raises UserError where it is no Hugging Face folder, with what makes one of it."""
    convert = f"make a Hugging Face folder of it: fm9g convert {folder} FOLDER"
    if folder.suffix == ".pt" and folder.is_file():
        raise UserError(f"{folder}: the weights of a 9G model; {convert}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (config.json is missing); make one with `fm9g convert`")
    if (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: a 9G checkpoint; {convert}")


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The ids that a generation starts from: those of the prompt, begun as the tokenizer begins a text, and not ended.

    Raises UserError where there is no token to start from.
    """
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # a tokenizer that ends each text (add_eos_token)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("prompt: it is empty, and the tokenizer has no token that begins a text; give a word at least")
    return ids


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
