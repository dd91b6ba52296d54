"""Text from a Hugging Face folder, by transformers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (config.json is missing); make one with `fm9g convert`")
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        template = load_template("tokenizer", load_tokenizer(folder))
        prompt = template.render([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
    elif system:
        raise UserError("system: goes with a chat (--chat)")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        model, report = loaded
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None
    if missing := report["missing_keys"]:
        raise UserError(f"{folder}: {min(missing)} is missing; config.json and the weights do not match")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().to(device)
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chat).to(device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        pad_token_id=model.config.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
