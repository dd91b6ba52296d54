"""Conversations, a template and mixtures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fm9g.data.encode.token_array import token_ids
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.inspect.check import open_named_mixture
from fm9g.data.load.mixture import Mixture

OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


CHAT = {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dogs"}]}


def open_chat_mixture(path: Path, tokenizer: Path, **settings: Any) -> Mixture:
    return open_named_mixture(str(path), tokenizer_path=str(tokenizer), max_length=256, **settings)[0]


def text_of(mixture: Mixture, number: int = 0) -> tuple[str, str]:
    """A record's tokens in words, and those that are trained on."""
    tokens = mixture.tokenize_records(0, [number], [number])[0]
    return words(mixture.tokenizer, tokens), words(mixture.tokenizer, tokens[1:][tokens[1:] >= 0])


def words(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    parts = []
    for token in token_ids(tokens).tolist():
        parts.append(tokenizer.special_token(token) or tokenizer.decode([token]))
    return "".join(parts)


TOOLS = [{"type": "function", "function": {"name": "fox"}}]


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "fox", "arguments": {}}}],
}
