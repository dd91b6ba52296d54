"""One continuation while it is generated: from logits to pieces of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from fm9g.infer.completion import LENGTH, STOP, Completion, Piece, TokenLogprob
from fm9g.infer.options import GenerationOptions
from fm9g.infer.sampler import Sampler
from fm9g.infer.text_stream import TextStream


class Continuation:
    """Chooses tokens, turns them into text, and knows when to end.

    Args:
        prompt: token ids.
        stop_ids: token ids that end it; their text is not part of it.
        tokenizer: of transformers.
        index: among the continuations of the prompt.

    Attributes:
        finish_reason: STOP or LENGTH at its end, before that empty.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        stop_ids: Collection[int],
        tokenizer: Any,
        index: int = 0,
    ) -> None:
        self.prompt, self.index = prompt, index
        self._sampler = Sampler(options, prompt, index)
        self._text, self.stop_ids = TextStream(tokenizer, options.stop), frozenset(stop_ids)
        self.max_new_tokens = options.max_new_tokens
        self._pieces: list[Piece] = []
        self.finish_reason = ""

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return self._sampler.token_ids

    def step(self, logits: torch.Tensor) -> Piece:
        """The piece of one more token. logits: (V,)"""
        token, logprob = self._sampler.choose(logits)
        if token in self.stop_ids:
            self.finish_reason = STOP
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = LENGTH
        text = self._text.add([] if self.finish_reason == STOP else [token], last=bool(self.finish_reason))
        if self._text.stopped:
            self.finish_reason = STOP
        logprobs: tuple[TokenLogprob, ...] = (logprob,) if logprob else ()
        piece = Piece(text, (token,), logprobs, self.finish_reason, self.index)
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """All its pieces in one."""
        return Completion(
            "".join(piece.text for piece in self._pieces),
            tuple(self.token_ids),
            self.finish_reason,
            tuple(logprob for piece in self._pieces for logprob in piece.logprobs),
            self.index,
            len(self.prompt),
        )
