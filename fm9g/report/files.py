"""Opens runs for reports: finds the logs folder that a name stands for, and reads its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.config.fields import did_you_mean
from fm9g.config.run import with_current_keys
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.json_file import read_object
from fm9g.run_files import EVENTS_FILE, METRICS_FILE, RUN_FILE, has_metrics, logs_dir, read_events, read_metrics

_MAX_LISTED = 30  # names in a message


@dataclass(frozen=True)
class Run:
    """What the files of a run say. All but `metrics` may be empty: for an old run, or one that just started.

    Args:
        name: the shortest that tells it from the other runs of the report.
        folder: its logs folder.
        metrics: a dict per logged step, in order; never empty.
        events: see fm9g.run_files.read_events.
        config: section -> key -> {"value", "from"}.
        data: a dict per dataset of the mixture.
        validation: a dict per dataset that it is evaluated on.
        summary: what training printed at its start.
        versions: package -> version.
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


def open_runs(names: list[str]) -> list[Run]:
    """The runs that `names` stand for (see find_run). Raises UserError."""
    folders = [find_run(name) for name in names]
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"{names[i]}: is given twice, also as {names[resolved.index(folder)]}; leave one out")
    return [open_run(folder, name) for folder, name in zip(folders, _short_names(resolved))]


def open_run(folder: Path, name: str = "") -> Run:
    """Reads a logs folder. Warns about lines that are left out. Raises UserError if it holds no metrics."""
    for part in (METRICS_FILE, EVENTS_FILE, RUN_FILE):
        register_input(folder / part)
    file = folder / METRICS_FILE
    if not has_metrics(file):
        # A line without its end is one that is being written, or that a crash cut off.
        if file.is_file() and b"\n" in file.read_bytes().lstrip():
            raise UserError(f'{file}: none of its lines is of a run, such as {{"step": 1, "Loss/train": 9.5}}')
        raise UserError(f"{file}: holds no metrics yet; wait until the run has logged a step")
    run = read_run_info(folder / RUN_FILE)
    events = read_events(folder / EVENTS_FILE)
    return Run(name or folder.resolve().name, folder, read_metrics(file), events, **run)


def read_run_info(file: Path) -> dict[str, Any]:
    """{"config", "data", "validation", "summary", "versions"} of a run, each empty if it is unknown.

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


def find_run(name: str) -> Path:
    """The logs folder that a user means.

    name: such a folder, a file in it, or the name of a run in data/logs/. Raises UserError that lists the runs there.
    """
    path, logs = Path(name), logs_dir()
    is_name = path.name == name
    candidates = [path]
    if path.name in (METRICS_FILE, EVENTS_FILE, RUN_FILE):
        candidates.append(path.parent)
    if is_name:
        candidates.append(logs / name)
    for folder in candidates:
        if (folder / METRICS_FILE).is_file():
            return folder
    if path.is_dir():
        problem = f"the folder holds no {METRICS_FILE}"
    elif path.is_file():
        problem = f"is not the {METRICS_FILE} of a run"
    else:
        problem = f"is neither a folder with a {METRICS_FILE} nor the name of a run in {logs}/"
    nearby = [path, logs] if is_name else [path, path.parent, logs]
    inside = next((folder for folder in nearby if _runs_in(folder)), logs)
    runs = _runs_in(inside)
    if runs:
        known = f"Runs in {inside}/: {', '.join(runs[:_MAX_LISTED])}"
        known += f" and {len(runs) - _MAX_LISTED} more" if len(runs) > _MAX_LISTED else ""
    else:
        known = f"No run is in {logs}/ here; go to where training was started, or give the path of a run's logs folder"
    raise UserError(f"{name or path}: {problem}{did_you_mean(path.name, runs)}. {known}".replace("?.", "?"))


def _runs_in(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob(f"*/{METRICS_FILE}")) if folder.is_dir() else []


def _short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as many last parts as it takes to tell the paths apart."""
    names, length = [path.name for path in paths], 1
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return names


def _dict_list(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _dict_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
