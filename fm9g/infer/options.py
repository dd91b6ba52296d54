"""How tokens are chosen in a generation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fm9g.errors import UserError

MAX_LOGPROBS = 20  # as in the OpenAI API


@dataclass(frozen=True)
class GenerationOptions:
    """How a continuation is generated. Raises UserError for a value out of range.

    Args:
        max_new_tokens: maximum length of the continuation.
        temperature: 0 takes the likeliest token each time.
        top_k: samples from that many of the likeliest tokens; 0: from all.
        top_p: samples from the likeliest tokens whose probabilities sum to this.
        min_p: leaves out tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: above 1 discourages repeats.
        seed: of the sampling; the same seed and prompt give the same text, whatever else is generated beside it.
        stop: texts that end the continuation; they are not part of it.
        num_return_sequences: continuations per prompt.
        logprobs: also log-probabilities: of the chosen tokens, and of that many of the likeliest ones; None: none.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    stop: tuple[str, ...] = ()
    num_return_sequences: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        in_range = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or 0.001 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "seed": 0 <= self.seed < 2**63,
            "num_return_sequences": self.num_return_sequences >= 1,
            "logprobs": self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
        }
        for name, allowed in in_range.items():
            if not allowed:
                raise UserError(f"{name}: found {getattr(self, name)}, which is out of range")
        if not all(self.stop):
            raise UserError("stop: an empty text would end each continuation at once; leave it out")
        if self.temperature == 0 and self.num_return_sequences > 1:
            raise UserError(
                f"num_return_sequences: {self.num_return_sequences} continuations would all be the same at temperature "
                "0; give a temperature"
            )
