"""Estimates of token counts, measured on the same records of each dataset in every process."""

from __future__ import annotations

import numpy as np

from fm9g.data.load.mixture import Mixture

_PROBE_RECORDS = 256  # records that are measured for the mean of a dataset
# Totals are counted where that takes a second or two, and estimated from more records elsewhere.
_COUNTED_BYTES, _TOTAL_PROBE_RECORDS = 2 << 20, 1024


def estimate_mean_tokens(mixture: Mixture) -> list[float]:
    """Mean tokens per sample of each dataset: as configured (at most max_length), otherwise measured."""
    means = []
    for number, config in enumerate(mixture.configs):
        if config.mean_tokens:
            means.append(min(config.mean_tokens, float(mixture.max_length)))
        else:
            _, lengths = _probe_lengths(mixture, number, _PROBE_RECORDS)
            means.append(sum(lengths) / len(lengths) if lengths else 1.0)
    return means


def estimate_total_tokens(mixture: Mixture) -> float:
    """Tokens of one epoch over all datasets."""
    total = 0.0
    for number, dataset in enumerate(mixture.datasets):
        is_counted = dataset.used_bytes <= _COUNTED_BYTES
        num_records, lengths = _probe_lengths(mixture, number, len(dataset) if is_counted else _TOTAL_PROBE_RECORDS)
        total += sum(lengths) / num_records * len(dataset)
    return total


def _probe_lengths(mixture: Mixture, number: int, count: int) -> tuple[int, list[int]]:
    """How many records of a dataset were measured, and the tokens of each of their samples."""
    drawn = mixture.probe_indices(number, count)
    tokens = mixture.read_tokens(number, np.array(drawn), sample_indices=drawn)
    segments = (segment for record in tokens for segment in mixture.split_or_truncate(number, record).segments)
    return len(drawn), [len(segment) - 1 for segment in segments]
