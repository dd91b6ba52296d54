"""Where figures go beside the console and metrics.jsonl: TensorBoard, Weights & Biases, SwanLab."""

from __future__ import annotations

import importlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fm9g.errors import UserError
from fm9g.files import new_file


@dataclass(frozen=True)
class Histogram:
    """counts: (n,) values in each bin, the first and last with all beyond. edges: (n + 1,). sum, squares: of the values
    and of their squares."""

    counts: np.ndarray
    edges: np.ndarray
    sum: float
    squares: float


class Sink(Protocol):
    """A place for figures. What it raises is said once and ends nothing."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, by tensorboardX."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: finished steps at the start; what the files hold of later ones is hidden."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for tag, histogram in histograms.items():
            self._writer.add_histogram_raw(
                tag,
                min=float(histogram.edges[0]),
                max=float(histogram.edges[-1]),
                num=float(histogram.counts.sum()),
                sum=histogram.sum,
                sum_squares=histogram.squares,
                bucket_limits=histogram.edges[1:].tolist(),
                bucket_counts=histogram.counts.tolist(),
                global_step=step,
            )

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline keeps everything on this machine."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any], first_step: int) -> None:
        """first_step: finished steps; a run that goes on does so in its curves there."""
        self._module = _find("wandb")
        kept = folder / "wandb_id"
        known = kept.read_text(encoding="utf-8").strip() if first_step and kept.is_file() else ""
        identity = known or uuid.uuid4().hex[:12]
        with new_file(kept) as temporary:
            temporary.write_text(identity, encoding="utf-8")
        self._run = self._module.init(
            project=project, name=name, id=identity, resume="allow", dir=str(folder), config=config
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        made = {tag: self._module.Histogram(np_histogram=(item.counts, item.edges)) for tag, item in histograms.items()}
        self._run.log(made, step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """SwanLab; SWANLAB_MODE=local or offline keeps everything on this machine. It has no histograms."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        self._run = _find("swanlab").init(project=project, experiment_name=name, logdir=str(folder), config=config)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None: ...

    def close(self) -> None:
        self._run.finish()


def open_sinks(
    names: list[str], tensorboard: Path, log: Path, project: str, run: str, config: dict[str, Any], first_step: int
) -> list[Sink]:
    """The sinks of these names. config: of the run, as they show it. Raises UserError where a package is missing."""
    makers: dict[str, Any] = {
        "tensorboard": lambda: TensorBoard(tensorboard, first_step),
        "wandb": lambda: WandB(project, run, log, config, first_step),
        "swanlab": lambda: SwanLab(project, run, log / "swanlab", config),
    }
    return [makers[name]() for name in dict.fromkeys(names)]


def require_sinks(names: list[str]) -> None:
    """Raises UserError where a package is missing, before anything takes time."""
    for name in names:
        if name != "tensorboard":
            _find(name)


def _find(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"report_to: {package} is not installed here; pip install {package}, or leave it out") from None
