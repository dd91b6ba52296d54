"""Where the figures of a run go: TensorBoard, a JSONL file, the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from fm9g.files import as_user_error, new_file
from fm9g.progress import Progress

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes the same figures everywhere; use as a context manager."""

    def __init__(self, tensorboard: Path, log: Path, first_step: int, last_step: int) -> None:
        """first_step: finished steps at the start. Figures of later steps, from a course that was left, are dropped."""
        self._file = log / METRICS_FILE
        log.mkdir(parents=True, exist_ok=True)
        if first_step == 0 and self._file.is_file():  # a new run under an old name
            self._file.replace(log / f"{METRICS_FILE}.old")
        kept = [figures for figures in read_metrics(self._file) if figures["step"] <= first_step]
        with new_file(self._file) as temporary:
            temporary.write_text("".join(json.dumps(figures) + "\n" for figures in kept), encoding="utf-8")
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=first_step + 1 if first_step else None)
        self._progress = Progress("step", total=last_step, unit="steps", done=first_step)

    def advance(self) -> None:
        """One more step is finished."""
        self._progress.advance()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """figures: TensorBoard tag -> value."""
        for tag, value in figures.items():
            self._tensorboard.add_scalar(tag, value, step)
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        except OSError as error:
            raise as_user_error(error, self._file) from error
        shown = {
            "loss": f"{figures['Loss/train']:.4f}",
            "lr": f"{figures['Optimizer/lr']:.3e}",
            "grad_norm": f"{figures['Optimizer/grad_norm']:.3f}",
            "tokens/s": f"{figures['Throughput/tokens_per_second']:.0f}",
        }
        self._progress.figures(" ".join(f"{key} {value}" for key, value in shown.items()))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.__exit__(None, None, None)
        self._tensorboard.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The figures of a run, a dict a logged step; a line that was cut off by a crash is left out."""
    if not file.is_file():
        return []
    figures = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            figures.append(content)
    return figures
