"""Names of the files and folders of a run, and how the lines of its metrics and events are read.

OUTPUT_DIR/                 the key output_dir; "data" by default
    checkpoints/NAME/STEP/  see fm9g.checkpoint.checkpoint; NAME: the key model_unique
    logs/GROUP+NAME/        GROUP: the key exp_group
        metrics.jsonl       a JSON object per logged step: {"step", "Loss/train", ...}
        events.jsonl        {"step", "time", "kind", "text"} per line
        run.json            {"config", "data", "validation", "summary", "versions"}
        start.json          which checkpoints were there when the run started; for restarts
        bad_batches/        documents of skipped steps
    tensorboard/GROUP+NAME/
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
RUN_FILE = "run.json"
START_FILE = "start.json"
SKIPPED_BATCHES_DIR = "bad_batches"
DEFAULT_OUTPUT_DIR = Path("data")

_FORMER_EVENT_KINDS = {"tidy_failed": "prune_failed"}
_MAX_LINE_BYTES = 1 << 22
_MAX_STEP, _MAX_TIME = 1 << 53, 1e11  # doubles count exactly up to this; seconds since 1970: the year 5138

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolders:
    """The folders of one run."""

    checkpoints: Path
    logs: Path
    tensorboard: Path

    @classmethod
    def of(cls, output_dir: str | Path, name: str, group: str = "") -> RunFolders:
        """The arguments are the training keys output_dir, model_unique and exp_group."""
        root = Path(output_dir)
        grouped = f"{group}{name}"
        return cls(checkpoints_dir(root) / name, logs_dir(root) / grouped, root / "tensorboard" / grouped)


def checkpoints_dir(output_dir: Path = DEFAULT_OUTPUT_DIR) -> Path:
    """The folder of the checkpoints of all runs."""
    return output_dir / "checkpoints"


def logs_dir(output_dir: Path = DEFAULT_OUTPUT_DIR) -> Path:
    """The folder of the logs of all runs."""
    return output_dir / "logs"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The metrics of a run, a dict per step, in order; empty without a file. Values that are not finite are None.

    Lines of the same step (it is logged, then evaluated) are merged. Warns about lines that are not metrics; a last
    line that a crash cut off is left out silently.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in _json_lines(file, lambda line: True):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a run in order, {"step", "time": seconds or None, "kind", "text"}; empty without a file.

    Warns as read_metrics does.
    """
    events = []
    for line in _json_lines(file, lambda line: isinstance(line.get("kind"), str)):
        kind, seconds, text = line["kind"], finite_or_none(line.get("time")), line.get("text")
        known = seconds is not None and 0 <= seconds < _MAX_TIME
        events.append(
            {
                **line,
                "kind": _FORMER_EVENT_KINDS.get(kind, kind),
                "time": seconds if known else None,
                "text": text if isinstance(text, str) else "",
            }
        )
    return events


def finite_or_none(value: Any) -> float | None:
    """A value as a number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e100:
        return None
    return float(value)


def has_metrics(file: Path) -> bool:
    """Whether read_metrics would find any."""
    return any(_parse_line(line) is not None for line in _lines(file))


def _json_lines(file: Path, is_valid: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """The lines of a file that are JSON objects with a step, and valid. Warns about the others at the end."""
    bad_lines = []
    for line_number, line in enumerate(_lines(file), 1):
        content = _parse_line(line)
        if content is not None and is_valid(content):
            yield content
        elif line.endswith(b"\n") and line.strip():  # a crash cuts the last one off
            bad_lines.append(line_number)
    if bad_lines:
        more = len(bad_lines) - 1
        subject = f"lines {bad_lines[0]} and {more} more are" if more else f"line {bad_lines[0]} is"
        logger.warning(f"{file}: {subject} left out: not a JSON object with a step from 0 on, as training writes them")


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file. A line that is too long for training to have written it is replaced by a short one."""
    if not file.is_file():
        return
    with file.open("rb") as content:
        while line := content.readline(_MAX_LINE_BYTES):
            is_long = len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n")
            while is_long and line and not line.endswith(b"\n"):
                line = content.readline(_MAX_LINE_BYTES)
            yield b"(too long)\n" if is_long else line


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None if the line is not one with a step."""
    try:
        content = json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None)  # old files hold NaN
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and _is_step(content.get("step")) else None


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_STEP
