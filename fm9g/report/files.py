"""The files that a run leaves in its logs folder, and which folder a name stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.config.fields import did_you_mean
from fm9g.config.load import read_object
from fm9g.config.run import with_current_keys
from fm9g.errors import UserError
from fm9g.io.inputs import register_input

METRICS_FILE = "metrics.jsonl"  # figures: a JSON object a logged step
EVENTS_FILE = "events.jsonl"  # what happened: {"step", "time", "kind", "text"} a line
RUN_FILE = "run.json"  # {"config", "data", "validation", "summary", "versions"}
LOGS_DIR = Path("data") / "logs"  # of runs that are given by name
_MAX_LISTED = 30  # names in a message
_MAX_LINE_BYTES = 1 << 22  # bytes
_MAX_STEP, _MAX_TIME = 1 << 53, 1e11  # what doubles count up to; seconds since 1970: the year 5138


@dataclass(frozen=True)
class Run:
    """What is known of a run. Everything but `metrics` may be empty: of an old run, or one that just started.

    name: as short as it can be without being another's. metrics: a dict a step, in order, never empty.
    config: section -> key -> {"value", "from"}. data, validation: a dict a dataset. versions: package -> version.
    notes: about lines of its files that could not be used.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: dict[str, dict[str, dict[str, Any]]]
    data: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    summary: str
    versions: dict[str, str]
    notes: list[str]


def open_runs(names: list[str]) -> list[Run]:
    """The runs that `names` stand for (see find_run). Raises UserError."""
    folders = [find_run(name) for name in names]
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"{names[i]}: is given twice, also as {names[resolved.index(folder)]}; leave one out")
    return [open_run(folder, name) for folder, name in zip(folders, _short_names(resolved))]


def open_run(folder: Path, name: str = "") -> Run:
    """Reads a logs folder. Raises UserError where it holds no figures."""
    for part in (METRICS_FILE, EVENTS_FILE, RUN_FILE):
        register_input(folder / part)
    notes: list[str] = []
    metrics = read_metrics(folder / METRICS_FILE, notes)
    if not metrics:
        file = folder / METRICS_FILE
        if notes:
            raise UserError(f'{file}: none of its lines is of a run, such as {{"step": 1, "Loss/train": 9.5}}')
        raise UserError(f"{file}: holds no figures yet; wait until the run has logged a step")
    run = read_run_info(folder / RUN_FILE)
    events = read_events(folder / EVENTS_FILE, notes)
    return Run(name or folder.resolve().name, folder, metrics, events, **run, notes=notes)


def read_metrics(file: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The figures of a run, a dict a step, in order; what is not finite is None. None of them where no file is.

    The lines of one step (it is logged, then evaluated) become one. A line that was cut off by a crash is left out.
    notes: gets a line about others that are left out.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in _json_lines(file, lambda line: True, notes):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def read_events(file: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """What happened, in order: {"step", "time": seconds or None, "kind", "text"}; none without a file.

    notes: as of read_metrics.
    """
    events = []
    for line in _json_lines(file, lambda line: isinstance(line.get("kind"), str), notes):
        seconds, text = finite_or_none(line.get("time")), line.get("text")
        known = seconds is not None and 0 <= seconds < _MAX_TIME
        events.append({**line, "time": seconds if known else None, "text": text if isinstance(text, str) else ""})
    return events


def read_run_info(file: Path) -> dict[str, Any]:
    """{"config", "data", "validation", "summary", "versions"} of a run, each empty where it is not known.

    Raises UserError.
    """
    content = read_object(file) if file.is_file() else {}
    config = {
        section: {key: item for key, item in values.items() if isinstance(item, dict) and "value" in item}
        for section, values in with_current_keys(_dict_or_empty(content.get("config"))).items()
        if isinstance(values, dict)
    }
    summary = content.get("summary")
    return {
        "config": config,
        "data": _dict_list(content.get("data")),
        "validation": _dict_list(content.get("validation")),
        "summary": summary if isinstance(summary, str) else "",
        "versions": {package: str(version) for package, version in _dict_or_empty(content.get("versions")).items()},
    }


def finite_or_none(value: Any) -> float | None:
    """A figure as a number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e100:
        return None
    return float(value)


def find_run(name: str) -> Path:
    """The logs folder that a user means.

    name: such a folder, a file in it, or the name of a run in data/logs/. Raises UserError that lists the runs there.
    """
    path = Path(name)
    named = [LOGS_DIR / name] if path.name == name else []
    file = [path.parent] if path.name in (METRICS_FILE, EVENTS_FILE, RUN_FILE) else []
    for folder in [path, *file, *named]:
        if (folder / METRICS_FILE).is_file():
            return folder
    inside = next(
        (folder for folder in [path, *([] if named else [path.parent]), LOGS_DIR] if _runs_in(folder)), LOGS_DIR
    )
    runs = _runs_in(inside)
    if path.is_dir():
        what = f"the folder holds no {METRICS_FILE}"
    elif path.is_file():
        what = f"is not the {METRICS_FILE} of a run"
    else:
        what = f"is neither a folder with a {METRICS_FILE} nor the name of a run in {LOGS_DIR}/"
    if not runs:
        known = (
            f"No run is in {LOGS_DIR}/ here; go to where training was started, or give the path of a run's logs folder"
        )
    else:
        known = f"Runs in {inside}/: {', '.join(runs[:_MAX_LISTED])}"
        known += f" and {len(runs) - _MAX_LISTED} more" if len(runs) > _MAX_LISTED else ""
    raise UserError(f"{name or path}: {what}{did_you_mean(path.name, runs)}. {known}".replace("?.", "?"))


def _json_lines(
    file: Path, is_valid: Callable[[dict[str, Any]], bool], notes: list[str] | None
) -> Iterator[dict[str, Any]]:
    """The JSON objects with a step that a file has in its lines. notes: gets a line about lines that are not such."""
    bad_lines = []
    for line_number, line in enumerate(_lines(file), 1):
        content = _parse_object(line)
        if content is not None and _is_step(content.get("step")) and is_valid(content):
            yield content
        elif line.endswith(b"\n") and line.strip():  # a crash cuts the last one off
            bad_lines.append(line_number)
    if bad_lines and notes is not None:
        count = (
            f"lines {bad_lines[0]} and {len(bad_lines) - 1} more are"
            if len(bad_lines) > 1
            else f"line {bad_lines[0]} is"
        )
        notes.append(f"{file}: {count} left out: not a JSON object with a step from 0 on, as training writes them")


def _lines(file: Path) -> Iterator[bytes]:
    """A file's lines, in place of those that training does not write so long another one."""
    if not file.is_file():
        return
    with file.open("rb") as content:
        while line := content.readline(_MAX_LINE_BYTES):
            is_long = len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n")
            while is_long and line and not line.endswith(b"\n"):
                line = content.readline(_MAX_LINE_BYTES)
            yield b"(too long)\n" if is_long else line


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None)  # old files hold NaN
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_STEP


def _runs_in(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob(f"*/{METRICS_FILE}")) if folder.is_dir() else []


def _short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as many of the last as it takes to tell them apart."""
    names, length = [path.name for path in paths], 1
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return names


def _dict_list(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _dict_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
