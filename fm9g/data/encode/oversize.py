"""Handling of records that give no sample, or a sample longer than max_length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fm9g.data.encode.token_array import split_samples

# Why a record gives no sample.
EMPTY, LONG_INPUT, OVERSIZE = "no output", "input longer than max_length", "longer than max_length"
REMEDIES = {  # for a run in which no record gives a sample
    EMPTY: "inspect them with `fm9g data show`; check the columns, the transform and train_on",
    LONG_INPUT: "raise max_length, or leave these records out; `fm9g data check` shows their lengths",
    OVERSIZE: "raise max_length, or set the dataset's oversize_rule to head or segment",
}


@dataclass(frozen=True)
class EncodedRecord:
    """The samples of one record, each a token array, or the reason why it has none."""

    segments: list[np.ndarray]
    skipped: str = ""


def split_or_truncate(tokens: np.ndarray, max_length: int, oversize_rule: str, row_length: int) -> EncodedRecord:
    """Makes samples of a record's token array.

    Args:
        max_length: positions of a sample, at most. A sample of n + 1 tokens fills n positions.
        oversize_rule: how a longer sample is handled. `drop` discards it. `head` keeps its first max_length tokens,
            `tail` its last. `segment` cuts plain text, which is trained on from its first token, into consecutive
            samples, and treats other records as `head`. `whole` keeps up to row_length tokens as one sample and
            discards longer ones.
        row_length: positions of a row.
    """
    samples = split_samples(tokens)
    if len(samples) == 1:
        return _split_or_truncate_sample(tokens, max_length, oversize_rule, row_length)
    encoded_samples = [_split_or_truncate_sample(sample, max_length, oversize_rule, row_length) for sample in samples]
    segments = [segment for encoded in encoded_samples for segment in encoded.segments]
    return EncodedRecord(segments, "" if segments else encoded_samples[-1].skipped)


def _split_or_truncate_sample(
    tokens: np.ndarray, max_length: int, oversize_rule: str, row_length: int
) -> EncodedRecord:
    length = len(tokens) - 1
    if 0 < length < max_length - 2:  # the usual case, and no rule below applies to it
        return EncodedRecord([tokens])
    if length < 1:
        return EncodedRecord([], EMPTY)
    limit = row_length if oversize_rule == "whole" else max_length
    prompt_length = int(np.argmax(tokens[1:] >= 0))  # before the first token that is trained on
    if oversize_rule == "tail" and length > limit:
        return EncodedRecord([tokens[-(limit + 1) :]])
    if prompt_length >= limit - 2:
        return EncodedRecord([], LONG_INPUT)
    if length <= limit:
        return EncodedRecord([tokens])
    if oversize_rule in ("drop", "whole"):
        return EncodedRecord([], OVERSIZE)
    if oversize_rule == "segment" and prompt_length == 0:
        return EncodedRecord([tokens[i : i + max_length + 1] for i in range(0, length, max_length)])
    return EncodedRecord([tokens[: max_length + 1]])
