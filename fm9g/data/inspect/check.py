"""Checks a mixture before a run: lengths, trained tokens, losses, duplicates, shares, epochs, padding.

Every record is encoded once (measure.py). Then the packing code of training runs over placeholders of the same lengths
(forecast.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fm9g.config.load import COMMAND_LINE, ConfigSource, build, require_config
from fm9g.config.mixture import load_mixture
from fm9g.config.run import with_defaults
from fm9g.config.train import TrainConfig
from fm9g.data.inspect.check_report import plot_report
from fm9g.data.inspect.check_warnings import find_warnings
from fm9g.data.inspect.forecast import MAX_SAMPLES, forecast_run
from fm9g.data.inspect.measure import MeasuredDataset, measure_dataset
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.mixture_checks import describe_templates
from fm9g.data.load.run_mixture import open_run_tokenizer
from fm9g.data.workers import check_workers, default_workers
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs
from fm9g.progress import Progress

REPORT_FILE, PLOT_FILE = "check.json", "lengths.png"

_MAX_COUNT = 10**9  # of steps, packs, records
_MIN_BYTES_FOR_WORKERS = 8 << 20  # below, starting processes takes longer than the work

CheckReport = dict[str, Any]


def open_named_mixture(name: str, **settings: Any) -> tuple[Mixture, Path]:
    """Opens a mixture as a run does.

    Args:
        name: in dataset_configs/, or a path.
        settings: training keys.

    Returns the mixture and its file.
    """
    train = build(TrainConfig, [ConfigSource(COMMAND_LINE, settings, text=True)])
    file = require_config("dataset_configs", name)
    configs = [with_defaults(dataset, train) for dataset in load_mixture(file)]
    row_length = train.batch_size * train.max_length
    mixture = Mixture(
        configs,
        open_run_tokenizer(train),
        train.max_length,
        train.seed,
        row_length,
        date=train.chat_template_date,
        collect_issues=True,
        samples_per_pack=train.samples_per_pack,
    )
    return mixture, file


@protect_inputs()
def check_mixture(
    name: str,
    output: Path,
    *,
    steps: int = 1000,
    packs: int = 8,
    sample: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    max_simulated_samples: int = MAX_SAMPLES,
    **settings: Any,
) -> CheckReport:
    """Reads a mixture completely and writes check.json and lengths.png to the folder `output`.

    Args:
        name: as in `open_named_mixture`.
        steps: of the run to forecast.
        packs: per step.
        sample: number of records to read of each dataset; None: all.
        workers: processes that encode; None: one per core if the mixture is large.
        overwrite: replace a folder that holds anything but an earlier report.
        max_simulated_samples: number of samples to pack; the rest of the run is extrapolated.
        settings: training keys.

    Returns the content of check.json. Raises UserError for a mistake, a bad record, and an existing folder.
    """
    check_workers(workers)
    for key, value in (("steps", steps), ("packs", packs), ("sample", sample)):
        if value is not None and not 1 <= value <= _MAX_COUNT:
            raise UserError(f"--{key}: found {value}, expected 1 to {_MAX_COUNT}")
    mixture, file = open_named_mixture(name, **settings)
    counts = [min(sample or len(dataset), len(dataset)) for dataset in mixture.datasets]
    if workers is None:
        num_bytes = sum(data.used_bytes / len(data) * count for data, count in zip(mixture.datasets, counts))
        workers = default_workers(num_bytes, _MIN_BYTES_FOR_WORKERS)
    is_own = output.is_dir() and {path.name for path in output.iterdir()} <= {REPORT_FILE, PLOT_FILE}
    with atomic_dir(output, overwrite or is_own) as folder:
        with TemporaryDirectory(dir=folder) as scratch:
            datasets = _measure(mixture, counts, workers, Path(scratch))
            report: CheckReport = {"mixture": str(file), **settings, "sample": sample, "steps": steps, "packs": packs}
            report |= _describe(mixture, datasets)
            packing, forecasts = forecast_run(mixture, datasets, steps, packs, max_simulated_samples)
            del datasets  # closes the files
        report["packing"] = packing  # in place of the key, which samples_per_pack tells
        for stats, forecast in zip(report["datasets"].values(), forecasts):
            stats |= forecast
        report["notes"] = find_warnings(report, mixture)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
        plot_report(report, folder / PLOT_FILE)
    return report


def _measure(mixture: Mixture, counts: list[int], workers: int, folder: Path) -> list[MeasuredDataset]:
    """counts: of records to read of each dataset. folder: for arrays."""
    with EncodingPool(mixture, workers) as pool, Progress("checking", sum(counts), "records") as progress:
        return [
            measure_dataset(pool, number, count, folder / str(number), progress) for number, count in enumerate(counts)
        ]


def _describe(mixture: Mixture, datasets: list[MeasuredDataset]) -> CheckReport:
    buckets = _bucket_bounds(max(data.stats["max"] for data in datasets), mixture.max_length)
    return {
        "max_length": mixture.max_length,
        "capacity": mixture.row_length,
        "samples_per_pack": mixture.samples_per_pack,
        "templates": describe_templates(mixture),
        "buckets": buckets,
        "datasets": {
            config.task_name: {**data.stats, "histogram": _histogram(data.sorted_lengths, buckets)}
            for config, data in zip(mixture.configs, datasets)
        },
    }


def _bucket_bounds(longest: int, max_length: int) -> list[int]:
    """Upper bounds, inclusive, of the histogram's buckets: powers of two and max_length."""
    return sorted({max_length, *(1 << power for power in range((max(longest, max_length) - 1).bit_length() + 1))})


def _histogram(sorted_lengths: np.ndarray, buckets: list[int]) -> list[int]:
    ends = np.searchsorted(sorted_lengths, np.array([0, *buckets], np.int32), side="right")
    counts: list[int] = np.diff(ends).tolist()
    return counts
