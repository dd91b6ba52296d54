"""`fm9g doctor` as a command, and all its checks on this machine."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from fm9g.cli import main
from fm9g.config.run import load_run
from fm9g.doctor.command import add_doctor_arguments, run_checks, run_doctor
from fm9g.doctor.findings import ERROR, OK, WARNING, Finding
from fm9g.errors import UserError
from fm9g.shorthand.load import RunArguments


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_doctor_arguments(parser)
    return parser.parse_args(words)


def test_a_number_of_nodes_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nodes", "0"]) == 2
    assert "--nodes: found 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_is_fit_for_the_tests(tmp_path: Path) -> None:
    run = load_run("tiny", {"output_dir": str(tmp_path / "out"), "train_iters": "10"}, complete=False)
    lines = {line.name: line for line in run_checks(run)}
    for name in ("Python", "torch", "numpy", "transformers", "other packages", "output_dir", "disk", "memory"):
        assert lines[name].status == OK or "slow:" in lines[name].detail, lines[name]
    assert lines["disk"].detail.endswith("1 checkpoints of 0.1 GiB to come: 0.1 GiB")
    assert not list((tmp_path / "out").iterdir())


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [Finding(OK, "Python", "3.11"), Finding(WARNING, "NCCL", "old", "newer")]
    monkeypatch.setattr("fm9g.doctor.command.run_checks", lambda *arguments: lines)
    assert run_doctor(options(), RunArguments()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 errors, 1 warning"
    lines.append(replace(lines[1], status=ERROR))
    assert run_doctor(options(), RunArguments()) == 1
    assert "-> newer" in capsys.readouterr().out
    lr_alone = RunArguments(words=("--lr", "1"))
    mistakes = (((), lr_alone), (("--master-port", "0"), RunArguments()), (("--node-rank", "1"), RunArguments()))
    for words, arguments in mistakes:
        with pytest.raises(UserError):
            run_doctor(options(*words), arguments)
