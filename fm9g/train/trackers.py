"""Experiment trackers: TensorBoard, Weights & Biases, SwanLab."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.run_files import RunFolders


@dataclass(frozen=True)
class Histogram:
    """A histogram of N bins.

    Args:
        counts: (N,) values per bin; the outer bins include all values beyond.
        edges: (N + 1,) borders of the bins.
        sum: of the values.
        sum_sq: of their squares.
    """

    counts: np.ndarray
    edges: np.ndarray
    sum: float
    sum_sq: float


class Tracker(Protocol):
    """A destination for metrics. Its errors do not stop training: MetricsLogger catches them."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, written by tensorboardX."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: finished steps at the start; the files' values of later steps are hidden."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for tag, histogram in histograms.items():
            self._writer.add_histogram_raw(
                tag,
                min=float(histogram.edges[0]),
                max=float(histogram.edges[-1]),
                num=float(histogram.counts.sum()),
                sum=histogram.sum,
                sum_squares=histogram.sum_sq,
                bucket_limits=histogram.edges[1:].tolist(),
                bucket_counts=histogram.counts.tolist(),
                global_step=step,
            )

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. With WANDB_MODE=offline nothing leaves this machine."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any], first_step: int) -> None:
        """first_step: finished steps at the start; a resumed run continues its curves."""
        self._module = _import_package("wandb")
        id_file = folder / "wandb_id"
        saved_id = id_file.read_text(encoding="utf-8").strip() if first_step and id_file.is_file() else ""
        run_id = saved_id or uuid.uuid4().hex[:12]
        with atomic_file(id_file) as temporary:
            temporary.write_text(run_id, encoding="utf-8")
        self._run = self._module.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=config
        )

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        images = {
            tag: self._module.Histogram(np_histogram=(item.counts, item.edges)) for tag, item in histograms.items()
        }
        self._run.log(images, step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """SwanLab, which has no histograms. With SWANLAB_MODE=local or offline nothing leaves this machine."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        self._run = _import_package("swanlab").init(
            project=project, experiment_name=name, logdir=str(folder), config=config
        )

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None: ...

    def close(self) -> None:
        self._run.finish()


def build_trackers(
    names: list[str], folders: RunFolders, project: str, run_name: str, config: dict[str, Any], first_step: int
) -> list[Tracker]:
    """Opens trackers.

    Args:
        names: some of tensorboard, wandb, swanlab.
        folders: of the run.
        project: heading that groups runs.
        run_name: name of the run there.
        config: training keys, to be shown with the run.
        first_step: finished steps at the start.

    Raises UserError if a package is missing.
    """
    factories: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folders.tensorboard, first_step),
        "wandb": lambda: WandB(project, run_name, folders.logs, config, first_step),
        "swanlab": lambda: SwanLab(project, run_name, folders.logs / "swanlab", config),
    }
    return [factories[name]() for name in dict.fromkeys(names)]


def check_trackers_installed(names: list[str]) -> None:
    """Raises UserError if a package is missing; cheap, so that a run can check at its start."""
    for name in names:
        if name != "tensorboard":
            _import_package(name)


def _import_package(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"report_to: {package} is not installed here; pip install {package}, or leave it out") from None
