"""`fm9g config`: values, their origins, and every key there is."""

import shlex
from pathlib import Path

import pytest
from helpers.common import ROOT, make_records, write_jsonl

from fm9g.cli import main


def test_config_show_tells_values_and_where_they_are_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").write_text('[{"task_name": "a", "path": "x"}]')
    arguments = "config show --config tiny --dataset_config ./m.json --tokenizer_path t --lr=0.5 --local False"
    assert main(shlex.split(arguments)) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["lr", "0.5", "command", "line"] in lines
    assert ["eps", "1e-06", "default"] in lines
    assert any(line[:2] == ["dim_model", "512"] and line[2].endswith("model_configs/tiny.json") for line in lines)
    assert printed.err.startswith("warning: command line: local changes nothing")


def test_config_keys_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "keys"]) == 0
    text = capsys.readouterr().out
    assert "gradient_accumulation_steps: integer >= 1; default 1" in text
    assert "task_name: string not empty; required" in text
    assert "local: paths are used as they are given" in text


def test_config_show_tells_what_is_missing(capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "show", "--config", str(ROOT / "model_configs" / "7b.json")]) == 0
    printed = capsys.readouterr()
    assert "dim_model 3584" in " ".join(printed.out.split())
    assert "needed for training: --dataset_config, --tokenizer_path" in printed.err


def test_memory_is_measured_in_one_process(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "a.jsonl", make_records(3))
    words = ["--model", "tiny", "--data", str(tmp_path / "a.jsonl"), "--tokenizer_path", str(tokenizer_path)]
    words += ["--output_dir", str(tmp_path / "out"), "--test_oom_error", "true"]
    assert main(["train", *words, "--nproc", "2"]) == 2
    assert "one process with the whole model; leave out --nproc 2" in capsys.readouterr().err
