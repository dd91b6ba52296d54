"""What a generation gives: pieces while it runs, and the whole at its end."""

from __future__ import annotations

from dataclasses import dataclass

STOP, LENGTH = "stop", "length"  # why a continuation ended: the model or a stop text ended it; max_new_tokens did


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token and its log-probability under the model, before temperature and the other options.

    Args:
        top: (token id, log-probability) of the likeliest tokens, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A step of one continuation.

    Args:
        text: new text; empty while a character or a stop text may still be incomplete.
        token_ids: new tokens; the tokens of a piece need not be those of its text.
        logprobs: one per token if they were asked for.
        finish_reason: STOP or LENGTH in the last piece, else empty.
        index: of the continuation, below num_return_sequences.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    index: int = 0


@dataclass(frozen=True)
class Completion:
    """A whole continuation; the fields are those of its pieces."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    prompt_tokens: int = 0
