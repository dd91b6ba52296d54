"""Chooses the tokens of one continuation, whatever is generated beside it.

Each continuation has its own options and its own random generator, so that its text depends on nothing else in the
batch. The processors are those of transformers, in the order of its generate().
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fm9g.infer.completion import TokenLogprob
from fm9g.infer.options import GenerationOptions


class Sampler:
    """The state of one continuation.

    Args:
        prompt: its token ids.
        index: of the continuation among those of its prompt; each has random numbers of its own.

    Attributes:
        token_ids: chosen so far.
    """

    def __init__(self, options: GenerationOptions, prompt: Sequence[int], index: int = 0) -> None:
        self.options, self.prompt, self.index = options, list(prompt), index
        self.token_ids: list[int] = []
        self._processors = _processors(options)
        self._generator = torch.Generator().manual_seed(_seed(options.seed, self.prompt, index))

    def choose(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token. logits: (V,)"""
        logprob = None
        scores = logits.float()[None]
        if self._processors:
            history = torch.tensor([[*self.prompt, *self.token_ids]], device=logits.device)
            scores = self._processors(history, scores)
        if self.options.temperature:
            # On the CPU, since a generator belongs to one device, and the numbers must not depend on it.
            token = int(torch.multinomial(scores[0].softmax(-1).cpu(), 1, generator=self._generator))
        else:
            token = int(scores[0].argmax())
        if self.options.logprobs is not None:
            logprob = _token_logprob(logits, token, self.options.logprobs)
        self.token_ids.append(token)
        return token, logprob


def _processors(options: GenerationOptions) -> Any:
    """transformers' processors of the options that change anything."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors: list[Any] = []
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature:
        if options.temperature != 1:
            processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(options.top_p))
        if options.min_p:
            processors.append(MinPLogitsWarper(options.min_p))
    return LogitsProcessorList(processors)


def _seed(seed: int, prompt: Sequence[int], index: int) -> int:
    """A seed for each continuation of each prompt; the same random numbers would make their texts alike."""
    return (seed + (zlib.crc32(repr((*prompt, index)).encode()) << 16)) % 2**63


def _token_logprob(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprob:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist())))
