"""From a record to training samples: token ids and targets, shifted by one, and what becomes of long records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fm9g.data.tokenizer import Tokenizer

IGNORED = -100  # a target that counts for no loss
EMPTY, LONG_INPUT, OVERSIZE = "no output", "input longer than max_length", "longer than max_length"


@dataclass(frozen=True)
class Encoded:
    """The samples of one record, each (ids, targets) of equal length <= max_length, or why it has none."""

    pieces: list[tuple[np.ndarray, np.ndarray]]
    skipped: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.pieces)


def encode(record: dict[str, Any], tokenizer: Tokenizer, max_length: int, oversize_rule: str) -> Encoded:
    """Encodes {"input", "output"}; input and output are encoded apart, so that their border is a token border.

    ids = [bos] + input + output; targets = -100 for the input, then output + [eos]: the target of each position is
    the token after it. oversize_rule: `drop` discards a long record, `head` keeps its first max_length tokens,
    `segment` cuts plain text (no input) into consecutive pieces and treats a record with an input as `head`.
    """
    prompt, answer = record.get("input", ""), record.get("output", "")
    if not answer:
        return Encoded([], EMPTY)
    prompt_ids = tokenizer.encode(prompt) if prompt else []
    if len(prompt_ids) >= max_length - 2:
        return Encoded([], LONG_INPUT)
    answer_ids = tokenizer.encode(answer)
    ids = np.array([tokenizer.bos_id, *prompt_ids, *answer_ids], dtype=np.int32)
    targets = np.array([IGNORED] * len(prompt_ids) + answer_ids + [tokenizer.eos_id], dtype=np.int32)
    if len(ids) <= max_length:
        return Encoded([(ids, targets)])
    if oversize_rule == "drop":
        return Encoded([], OVERSIZE)
    if oversize_rule == "segment" and not prompt_ids:
        starts = range(0, len(ids), max_length)
        return Encoded([(ids[i : i + max_length], targets[i : i + max_length]) for i in starts])
    return Encoded([(ids[:max_length], targets[:max_length])])
