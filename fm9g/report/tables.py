"""The tables of the page, as text: key results, events, data, and the configuration side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from fm9g.config.fields import keys_of
from fm9g.config.run import section_class
from fm9g.report.curves import curve, running_mean
from fm9g.report.devices import describe_devices, memory_note
from fm9g.report.files import Run
from fm9g.report.panels import EVENT_KINDS, is_routine, tasks_of, validation_tasks_of
from fm9g.run_files import finite_or_none

MISSING = "\u2013"
DEFAULT_ORIGIN = "default"  # the origin of a value that nobody set


@dataclass(frozen=True)
class Row:
    """A row of a table. note: what it means. cells: (value, origin) per run. differs: between runs."""

    label: str
    note: str
    cells: list[tuple[str, str]]
    differs: bool = False


@dataclass(frozen=True)
class Group:
    """A section of the configuration. rows: keys that were set, or differ between runs. defaults: the others."""

    title: str
    rows: list[Row]
    defaults: list[Row]


def results(runs: list[Run]) -> list[Row]:
    """The key results, a row each, without those that no run has."""
    rows: list[tuple[str, str, Callable[[Run], str]]] = [
        ("Steps", "updates of the weights", _steps),
        ("Tokens", "pieces of text it was trained on", _tokens),
        ("Loss at the end", "of the last logged step; lower is better", lambda run: _last(run, "Loss/train")),
        ("Loss, mean of the last steps", "the same without the noise of a single step", _smooth_loss),
        ("Best loss", "of any logged step", lambda run: _best(run, "Loss/train")),
        ("Validation loss at the end", "on text that is not trained on", lambda run: _last(run, "Loss/val")),
        ("Best validation loss", "the lowest", lambda run: _best(run, "Loss/val")),
        ("Perplexity at the end", "exp of the validation loss", lambda run: _last(run, "Perplexity/val")),
        ("Tokens per second", "on average", _rate),
        ("MFU", "share of the peak FLOPs of the hardware, on average", _mfu),
        ("Peak memory", memory_note(runs), _memory),
        (
            "Skipped steps",
            "did not change the weights: gradients not finite, or out of memory",
            lambda run: _last(run, "Run/skipped", ",.0f"),
        ),
        ("Trained on", "the devices", lambda run: describe_devices(run) or MISSING),
        ("Duration", "without the pauses between launches", lambda run: _duration(run.events)),
        ("Started", "UTC", lambda run: _utc_time(run.events[0]["time"]) if run.events else MISSING),
    ]
    rows_of_runs = [Row(label, note, [(cell(run), "") for run in runs]) for label, note, cell in rows]
    return [row for row in rows_of_runs if any(value != MISSING for value, _ in row.cells)]


def events(runs: list[Run], routine: bool) -> list[dict[str, str]]:
    """Events by time: {"run", "time", "step", "kind", "sign", "text"}. routine: those that are, or the others."""
    pairs = [(event, run.name) for run in runs for event in run.events if is_routine(run, event) == routine]
    pairs.sort(key=lambda pair: (pair[0]["time"] or 0, pair[0]["step"]))
    rows = []
    for event, name in pairs:
        _, sign, words = EVENT_KINDS.get(event["kind"], ("", "✚", event["kind"]))
        row = {"run": name, "time": _utc_time(event["time"]), "step": f"{event['step']:,}"}
        rows.append({**row, "kind": words, "sign": sign, "text": event["text"]})
    return rows


def datasets(run: Run) -> list[dict[str, str]]:
    """The datasets of a run: planned shares, and what was trained on so far."""
    known = {str(item.get("task")): item for item in run.data}
    total = sum(_last_value(run, f"Tokens/{task}") or 0 for task in tasks_of(run))
    rows = []
    for task in tasks_of(run):
        item, tokens = known.get(task, {}), _last_value(run, f"Tokens/{task}")
        rows.append(
            {
                "dataset": task,
                "records": _format(finite_or_none(item.get("records")), ",.0f"),
                "tokens per sample": _format(finite_or_none(item.get("tokens_a_sample")), ",.1f"),
                "target share": _format(finite_or_none(item.get("share")), ".1%"),
                "share so far": _format(tokens / total if tokens is not None and total else None, ".1%"),
                "tokens so far": _format_count(tokens),
                "epochs so far": _format(_last_value(run, f"Epoch/{task}"), ".2f"),
                "template": str(item.get("template") or MISSING),
                "trained on": str(item.get("loss") or MISSING),
                "path": str(item.get("path") or MISSING),
            }
        )
    return _without_empty_columns(rows)


def validation_datasets(run: Run) -> list[dict[str, str]]:
    """The datasets that a run is evaluated on, with the loss on each."""
    known = {str(item.get("task")): item for item in run.validation}
    rows = []
    for task in validation_tasks_of(run):
        item, loss = known.get(task, {}), f"Loss/val/{task}"
        rows.append(
            {
                "dataset": task,
                "records": _format(finite_or_none(item.get("records")), ",.0f"),
                "loss at the end": _last(run, loss),
                "best loss": _best(run, loss),
                "perplexity at the end": _last(run, f"Perplexity/val/{task}"),
                "template": str(item.get("template") or MISSING),
                "path": str(item.get("path") or MISSING),
            }
        )
    return _without_empty_columns(rows)


def _without_empty_columns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    used = [key for key in (rows[0] if rows else {}) if any(row[key] != MISSING for row in rows)]
    return [{key: row[key] for key in used} for row in rows]


def configuration(runs: list[Run]) -> list[Group]:
    """Every value of every run with its origin. A run without a saved configuration differs from none."""
    titles = {"train": "Training", "model": "Model"}
    groups = []
    for section in dict.fromkeys(section for run in runs for section in run.config):
        rows = []
        for key in dict.fromkeys(key for run in runs for key in run.config.get(section, {})):
            items = [run.config.get(section, {}).get(key) if run.config else {} for run in runs]
            rows.append((_row(key, _meaning(section, key), items), items))
        title = titles.get(section) or f"Data: {section.removeprefix('data.')}"
        groups.append(_group(title, rows))
    return groups


def versions(runs: list[Run]) -> list[Row]:
    """Package versions of each run."""
    rows = []
    for package in dict.fromkeys(package for run in runs for package in run.versions):
        items: list[dict[str, Any] | None] = []
        for run in runs:
            version = run.versions.get(package)
            items.append({"value": version} if version else None if run.versions else {})
        rows.append(_row(package, "", items))
    return rows


def _row(key: str, meaning: str, items: list[dict[str, Any] | None]) -> Row:
    """items: per run; None if it lacks the key, {} if nothing was recorded at all."""
    known = {json.dumps(item["value"], sort_keys=True) if item else MISSING for item in items if item != {}}
    cells = [
        (_format_value(item["value"]), str(item.get("from") or ""))
        if item
        else (MISSING if item is None else "not recorded", "")
        for item in items
    ]
    return Row(key, meaning, cells, differs=len(known) > 1)


def _group(title: str, rows: Iterable[tuple[Row, list[dict[str, Any] | None]]]) -> Group:
    shown: list[Row] = []
    defaults: list[Row] = []
    for row, items in rows:
        untouched = not row.differs and all(item.get("from") == DEFAULT_ORIGIN for item in items if item)
        (defaults if untouched else shown).append(row)
    return Group(title, shown, defaults)


def _meaning(section: str, key: str) -> str:
    cls = section_class(section)
    field = keys_of(cls).get(key)
    return field.metadata["help"] if field else ""


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value or "(empty)"
    return json.dumps(value, ensure_ascii=False)


def _steps(run: Run) -> str:
    planned = run.config.get("train", {}).get("train_iters", {}).get("value")
    last = run.metrics[-1]["step"]
    return f"{last:,} of {planned:,}" if isinstance(planned, int) else f"{last:,}"


def _tokens(run: Run) -> str:
    total = _last_value(run, "Run/tokens")
    if total is None:
        parts = [tokens for task in tasks_of(run) if (tokens := _last_value(run, f"Tokens/{task}")) is not None]
        total = sum(parts) if parts else None
    return _format_count(total)


def _series(run: Run, key: str) -> list[tuple[int, float]]:
    return [(line["step"], value) for line in run.metrics if (value := finite_or_none(line.get(key))) is not None]


def _last_value(run: Run, key: str) -> float | None:
    return next((value for line in reversed(run.metrics) if (value := finite_or_none(line.get(key))) is not None), None)


def _last(run: Run, key: str, spec: str = ",.4f") -> str:
    return _format(_last_value(run, key), spec)


def _smooth_loss(run: Run) -> str:
    means = running_mean(curve(run.metrics, "Loss/train")).values
    known = means[means == means]  # NaN is not itself
    return _format(float(known[-1]), ".4f") if len(known) else MISSING


def _best(run: Run, key: str) -> str:
    if not (values := _series(run, key)):
        return MISSING
    step, value = min(values, key=lambda pair: pair[1])
    return f"{value:,.4f} at step {step:,}"


def _mean_rate(run: Run, key: str) -> float | None:
    """The harmonic mean: logged rates cover about the same number of tokens, so this is total tokens / total time."""
    rates = [value for _, value in _series(run, key) if value > 0]
    return len(rates) / sum(1 / rate for rate in rates) if rates else None


def _rate(run: Run) -> str:
    return _format(_mean_rate(run, "Throughput/tokens_per_second"), ",.0f")


def _mfu(run: Run) -> str:
    return _format(_mean_rate(run, "Throughput/mfu"), ".1%")


def _memory(run: Run) -> str:
    values = [value for _, value in _series(run, "Memory/peak_gb")]
    return f"{max(values):,.1f} GB" if values else MISSING


def _duration(events: list[dict[str, Any]]) -> str:
    """The time of all launches; one that crashed ends with the last event that it wrote."""
    seconds, before = 0.0, None
    for event in events:
        if event["time"] is None:
            continue
        if before is not None and event["kind"] not in ("start", "resume"):
            seconds += max(0.0, event["time"] - before)
        before = event["time"]
    if seconds <= 0:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d" if days else "", f"{hours} h" if hours else "", f"{minutes} min" if minutes else ""]
    return " ".join(part for part in [*parts, "" if days or hours else f"{rest} s"] if part)


def _utc_time(seconds: float | None) -> str:
    """UTC, so that the page is the same wherever it is rendered."""
    if seconds is None:
        return MISSING
    try:
        moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)
    except OverflowError:
        return MISSING
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def _format_count(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value / 1e9:,.2f} billion" if value >= 1e9 else f"{value:,.0f}"


def _format(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec)
