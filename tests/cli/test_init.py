"""`fm9g init`: a run file from flags or answers, which `fm9g train` reads as the same run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from helpers.common import make_records, write_jsonl

from fm9g.cli import main
from fm9g.config.fields import keys_of
from fm9g.config.train import TrainConfig
from fm9g.shorthand.load import RunArguments, load_run


@pytest.fixture
def here(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "数据.jsonl", make_records(20))
    return tmp_path


def init(tokenizer: Path, *words: str) -> int:
    return main(["init", "--model", "tiny", "--data", "数据.jsonl", "--tokenizer_path", str(tokenizer), *words])


def test_the_file_is_the_run_that_the_flags_are(
    here: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tokenizer_path, "--method", "full", "--model_unique", "第一", "--lr", "2e-5", "--n_gpus", "2") == 0
    shown = capsys.readouterr().out
    assert "run.yaml: start it with: fm9g train run.yaml" in shown
    assert "It fits: " in shown
    assert "on 2 x A100" in shown
    content = yaml.safe_load((here / "run.yaml").read_text(encoding="utf-8"))
    assert content == {
        "model": "tiny",
        "data": "数据.jsonl",
        "method": "full",
        "model_unique": "第一",
        "n_gpus": 2,
        "tokenizer_path": str(tokenizer_path),
        "lr": 2e-5,
    }
    run = load_run(RunArguments(file="run.yaml"))
    assert (run.train.lr, run.train.n_gpus, run.train.model_unique) == (2e-5, 2, "第一")


def test_every_commented_key_holds_the_value_that_the_run_has(here: Path, tokenizer_path: Path) -> None:
    assert init(tokenizer_path, "--method", "full") == 0
    text = (here / "run.yaml").read_text(encoding="utf-8")
    before = load_run(RunArguments(file="run.yaml"))
    commented = re.compile(rf"^# (?=({'|'.join(keys_of(TrainConfig))}): )", re.MULTILINE)
    lines = commented.sub("", text).split("\n")
    (here / "all.yaml").write_text("\n".join(lines), encoding="utf-8")
    content = yaml.safe_load("\n".join(lines))
    assert {"lr", "epochs", "batch_size", "save_iters", "seed"} <= content.keys()
    assert load_run(RunArguments(file="all.yaml")).train == before.train


def test_wrong_answers_are_asked_again(
    here: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["tinny", "tiny", "gone.jsonl", "数据.jsonl", "lroa", "full", "", "0", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["init", "--tokenizer_path", str(tokenizer_path)]) == 0
    shown = capsys.readouterr().out
    for problem in ("did you mean 'tiny'", "gone.jsonl: no such file", "found 'lroa'", "n_gpus: found '0'"):
        assert problem in shown
    assert yaml.safe_load((here / "run.yaml").read_text(encoding="utf-8"))["model_unique"] == "first"


def test_mistakes_write_nothing(
    here: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    for words, problem in (
        (["--method", "full"], "give --model and --data; in a terminal"),
        (["--model", "tiny", "--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--model", "tiny", "--data", "数据.jsonl", "--lerning_rate", "1"], "lerning_rate: unknown key"),
        (["--output", "run.txt"], "--output"),
    ):
        assert main(["init", *words]) == 2
        assert problem in capsys.readouterr().err
    assert not (here / "run.yaml").exists()
    (here / "run.yaml").write_text("kept", encoding="utf-8")
    assert init(tokenizer_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (here / "run.yaml").read_text(encoding="utf-8") == "kept"


def test_the_file_is_written_before_the_data_is_read(
    here: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.jsonl").write_text("no JSON\n", encoding="utf-8")
    words = ["--model", "tiny", "--data", "bad.jsonl", "--tokenizer_path", str(tokenizer_path), "--method", "full"]
    assert main(["init", *words, "--model_unique", "x", "--n_gpus", "1"]) == 2
    assert "bad.jsonl" in capsys.readouterr().err
    assert (here / "run.yaml").exists()
