"""The tokens at which generation stops."""

from __future__ import annotations

from typing import Any

from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.errors import UserError

_ANSWER = "qxanswer"  # a text that no template writes by itself
_TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "q"},
]


def stop_token_ids(tokenizer: Tokenizer, template: Template | None) -> list[int]:
    """The token ids at which generation stops: the template's end of a turn, and the tokenizer's eos.

    The first is the one that ended the answers in training.
    """
    eos = tokenizer.eos_id
    if template is None:
        return [eos]
    end_of_turn = _token_after_answer(tokenizer, template, _TURNS[:2])
    if end_of_turn is not None:
        return list(dict.fromkeys([end_of_turn, eos]))
    next_turn = _token_after_answer(tokenizer, template, _TURNS)  # in a format without end markers
    return [eos] if next_turn is None else [eos, next_turn]


def _token_after_answer(tokenizer: Tokenizer, template: Template, messages: list[dict[str, Any]]) -> int | None:
    """The special token that the template writes after the answer; None if it writes none."""
    try:
        text = template.render(messages)
    except UserError:
        return None
    end = text.rfind(_ANSWER) + len(_ANSWER)
    match = tokenizer.special_pattern.match(text[end:].lstrip())
    token = tokenizer.special_ids[match[0]] if match else None
    return None if tokenizer.bos_token and token == tokenizer.bos_id else token
