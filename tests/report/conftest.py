"""Runs as training leaves them, made up."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

TASKS = ("wiki", "<script>alert('对话')</script> & $x$")


def line(step: int, **more: object) -> dict:
    loss = 2 + 8 / step
    return {
        "step": step,
        "Loss/train": loss,
        **{f"Loss/train/{task}": loss + i for i, task in enumerate(TASKS)},
        "Optimizer/lr": 1e-4 * step,
        "Optimizer/grad_norm": 1.0 / step,
        "Optimizer/scale": 1,
        "Throughput/tokens_per_second": 1000.0,
        "Throughput/mfu": 0.4,
        "Time/data": 0.1,
        "Time/compute": 0.8,
        "Time/communication": 0.1,
        "Memory/peak_gb": 10.0 + step,
        "Run/tokens": 100 * step,
        "Tokens/wiki": 75 * step,
        f"Tokens/{TASKS[1]}": 25 * step,
        "Epoch/wiki": step / 4,
        "Run/skipped": 2,
        **more,
    }


EVENTS = [
    {"step": 0, "time": 1_700_000_000, "kind": "start", "text": "Started on 2 GPUs."},
    {"step": 5, "time": 1_700_000_060, "kind": "best", "text": "Best so far."},
    {"step": 7, "time": 1_700_000_070, "kind": "spike", "text": "A jump to 12 & <more>."},
    {"step": 8, "time": 1_700_000_080, "kind": "save", "text": "Saved."},
    {"step": 8, "time": 1_700_009_000, "kind": "resume", "text": "Went on."},
    {"step": 10, "time": 1_700_009_020, "kind": "end", "text": "Done."},
]


def settings(**values: object) -> dict:
    """A section of a configuration: `lr` from the command line, everything else as it is by default."""
    return {key: {"value": v, "from": "command line" if key == "lr" else "default"} for key, v in values.items()}


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes data/logs/NAME in the current folder: make_run(name, metrics=[...], events=[...], run={...} or None)."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, metrics: list | None = None, events: list = EVENTS, run: dict | None = None) -> Path:
        folder = Path("data") / "logs" / name
        folder.mkdir(parents=True)
        lines = [line(step) for step in range(1, 11)] if metrics is None else metrics
        (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics) + "\n" for metrics in lines))
        if events:
            (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        if run is not None:
            (folder / "run.json").write_text(json.dumps(run))
        return folder

    return make


@pytest.fixture(name="line")
def line_fixture() -> Callable[..., dict]:
    """line(step, key=value): the figures of a step."""
    return line


@pytest.fixture(name="settings")
def settings_fixture() -> Callable[..., dict]:
    return settings
