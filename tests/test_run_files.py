"""Names of the files of a run, and reading their lines."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from fm9g.run_files import RunFolders, checkpoints_dir, finite_or_none, logs_dir, read_events, read_metrics


def test_lines_of_one_step_become_one_and_broken_ones_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    separator = "\u2028"  # str.splitlines ends a line here
    file.write_text(
        '{"step": 4, "Loss/train": 2.5, "note": "a' + separator + 'b"}\n'
        '{"step": 2, "Loss/train": NaN, "Optimizer/lr": -Infinity}\n'
        '[1]\nnull\n{"Loss/train": 1}\n{"step": true}\n\n'
        '{"step": 4, "Loss/val": 3.5}\n{"step": 6, "Loss/tr',
        encoding="utf-8",
    )
    assert read_metrics(file) == [
        {"step": 2, "Loss/train": None, "Optimizer/lr": None},
        {"step": 4, "Loss/train": 2.5, "note": f"a{separator}b", "Loss/val": 3.5},
    ]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_events_may_be_missing_or_malformed(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []
    (tmp_path / "events.jsonl").write_text('{"step": 1, "time": "x", "kind": "save"}\n{"kind": "end"}\n{"st')
    assert read_events(tmp_path / "events.jsonl") == [{"step": 1, "time": None, "kind": "save", "text": ""}]


def test_former_kinds_of_events_are_read_as_todays(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"step": 1, "time": 1, "kind": "tidy_failed", "text": "t"}\n')
    assert [event["kind"] for event in read_events(tmp_path / "events.jsonl")] == ["prune_failed"]


def test_the_folders_of_a_run_follow_from_three_keys() -> None:
    folders = RunFolders.of("out", "name", "group_")
    assert folders == RunFolders(
        Path("out/checkpoints/name"), Path("out/logs/group_name"), Path("out/tensorboard/group_name")
    )
    assert (checkpoints_dir(), logs_dir()) == (Path("data/checkpoints"), Path("data/logs"))


@pytest.mark.parametrize("module", ["fm9g.run_files", "fm9g.report.files"])
def test_the_readers_import_light(module: str) -> None:
    code = f"import sys, {module}\n"
    code += "print([name for name in ('torch', 'numpy', 'matplotlib', 'jinja2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_training_and_reports_read_metrics_with_the_same_function() -> None:
    from fm9g.report import files
    from fm9g.train import metrics_logger

    assert metrics_logger.read_metrics is files.read_metrics is read_metrics
    assert metrics_logger.METRICS_FILE == files.METRICS_FILE


def test_a_number_is_finite() -> None:
    assert [finite_or_none(value) for value in (1, 0.5, math.inf, math.nan, True, "1", None)] == [1, 0.5, *[None] * 5]
