"""Forecasts a run: the packing code of training packs placeholders that have the lengths of the measured records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from fm9g.data.encode.oversize import EncodedRecord
from fm9g.data.encode.token_array import join_samples
from fm9g.data.inspect.measure import DatasetStats, MeasuredDataset
from fm9g.data.load.loader import trimmed_length
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import PackStream
from fm9g.data.load.record_source import RecordSource
from fm9g.data.load.sampling_plan import SamplingPlan, make_sampling_plan

MAX_SAMPLES = 20_000  # samples that are packed; the rest of the run is extrapolated
_LOOKUP_BLOCK = 512  # sample indices of a dataset that are looked up at a time


def forecast_run(
    mixture: Mixture, datasets: Sequence[MeasuredDataset], steps: int, packs: int, max_samples: int = MAX_SAMPLES
) -> tuple[dict[str, Any], list[DatasetStats]]:
    """What each dataset contributes to a run, and how full the packs are.

    Args:
        datasets: of the mixture, measured.
        steps: of the run.
        packs: per step.
        max_samples: number of samples to pack, at least those of one step.

    Returns "packing" and the statistics of each dataset, as in check.json.
    """
    plan = make_sampling_plan(mixture, packs)
    # A dataset without a trained token would end the run.
    proportions = [p if data.stats["kept_tokens"] else 0.0 for p, data in zip(plan.proportions, datasets)]
    plan = replace(plan, proportions=proportions, concat_order=plan.concat_order if any(proportions) else None)
    packed = _simulate(plan, mixture.row_length, _PlaceholderSource(mixture, datasets), steps, max_samples)
    realised = packed.tokens / max(1.0, packed.tokens.sum())
    epoch_tokens = np.array([_estimated_tokens(data.stats) for data in datasets])
    tokens, run_steps = packed.tokens, packed.steps
    if not packed.used_up and packed.steps < steps:
        budget = packed.tokens.sum() / packed.steps * steps
        tokens = _extrapolate(realised, budget, np.where(plan.repeats, np.inf, epoch_tokens))
        run_steps = min(steps, math.ceil(tokens.sum() / budget * steps))
    packing = {
        "rows": packed.rows,
        "samples": packed.samples,
        "padding": float(1 - packed.tokens.sum() / packed.positions) if packed.rows else 0.0,
        "samples_per_row": packed.samples / max(1, packed.rows),
        "steps": run_steps,
    }
    wanted = epoch_tokens / epoch_tokens.sum() if plan.concat_order else mixture.proportions()
    return packing, [
        _dataset_forecast(data, *values) for data, *values in zip(datasets, wanted, realised, tokens, epoch_tokens)
    ]


def _estimated_tokens(stats: DatasetStats) -> float:
    """Tokens of all records, estimated from those that were read."""
    return float(stats["kept_tokens"] / stats["read"] * stats["records"])


def _dataset_forecast(
    data: MeasuredDataset, share_wanted: float, share_realised: float, tokens: float, epoch_tokens: float
) -> DatasetStats:
    epochs = float(tokens / epoch_tokens) if epoch_tokens else 0.0
    return {
        "share_wanted": float(share_wanted),
        "share_realised": float(share_realised),
        "run_tokens": round(tokens),
        "run_records": round(epochs * data.stats["records"]),
        "run_epochs": epochs,
    }


@dataclass
class _PackedRun:
    """The first steps of a run.

    Args:
        tokens: (datasets,) number of tokens of each dataset.
        rows: number of packs that have a sample.
        positions: of these packs, padding included.
        used_up: the datasets gave no more samples.
    """

    tokens: np.ndarray
    rows: int = 0
    positions: int = 0
    samples: int = 0
    steps: int = 0
    used_up: bool = False


def _simulate(plan: SamplingPlan, row_length: int, source: RecordSource, steps: int, max_samples: int) -> _PackedRun:
    run = _PackedRun(np.zeros(len(plan.names)))
    streams = [PackStream(stream, plan, row_length, source) for stream in range(plan.num_streams)]
    while run.steps < steps and run.samples < max_samples:
        packs = [pack for stream in streams if (pack := stream.next_samples())]
        if not packs and not plan.has_empty_packs:
            run.used_up = True
            break
        for pack in packs:
            for sample in pack:
                run.tokens[sample.dataset] += sample.length
            used = sum(sample.length for sample in pack)
            run.positions += trimmed_length(used) if plan.samples_per_pack else row_length
        run.rows += len(packs)
        run.samples += sum(map(len, packs))
        run.steps += 1
    return run


class _PlaceholderSource(RecordSource):
    """Records whose samples have the measured numbers of tokens, and of tokens before the first trained one."""

    def __init__(self, mixture: Mixture, datasets: Sequence[MeasuredDataset]) -> None:
        self._mixture, self._datasets = mixture, datasets
        self._longest = max(data.stats["max"] for data in datasets)
        # Every placeholder is a slice: masked tokens, then trained ones.
        self._tokens = np.repeat(np.array([-1, 0], np.int32), self._longest + 1)

        @cache  # small datasets have many epochs, and all streams read the same ones
        def record_indices(dataset: int, block: int) -> np.ndarray:
            return mixture.record_indices(dataset, range(block * _LOOKUP_BLOCK, (block + 1) * _LOOKUP_BLOCK))

        self._record_indices = record_indices

    def encode(self, dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        data = self._datasets[dataset]
        blocks = (divmod(sample_index, _LOOKUP_BLOCK) for sample_index in sample_indices)
        indices = np.array([self._record_indices(dataset, block)[offset] for block, offset in blocks])
        # If only some records were read, the nearest of these.
        rows = indices * (len(data.bounds) - 1) // len(self._mixture.datasets[dataset])
        return [
            self._mixture.split_or_truncate(dataset, join_samples(list(self._placeholders(data, row))))
            for row in rows.tolist()
        ]

    def _placeholders(self, data: MeasuredDataset, row: int) -> Iterator[np.ndarray]:
        samples = slice(data.bounds[row], data.bounds[row + 1])
        for length, prompt_length in zip(data.lengths[samples].tolist(), data.prompt_lengths[samples].tolist()):
            yield self._tokens[self._longest - prompt_length :][: length + 1]


def _extrapolate(proportions: np.ndarray, budget: float, limits: np.ndarray) -> np.ndarray:
    """(datasets,) the tokens of each dataset in a budget of tokens.

    proportions, limits: (datasets,) share of each, and its tokens; the rest of a dataset that is used up goes to the
    others.
    """
    tokens, active = np.zeros(len(proportions)), proportions > 0
    while active.any() and budget > 0:
        part = np.minimum(budget * proportions * active / proportions[active].sum(), limits - tokens)
        tokens, budget = tokens + part, budget - part.sum()
        if not (used_up := active & (tokens >= limits)).any():
            break
        active &= ~used_up
    return tokens
