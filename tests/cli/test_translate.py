"""`fm9g config translate`."""

import shlex
from pathlib import Path

import pytest

from fm9g.cli import main
from fm9g.shorthand.load import RunArguments, load_run

WORDS = shlex.split(
    "--model_name_or_path tiny --bf16 True --learning_rate 3e-5 --lr_scheduler_type cosine "
    "--report_to tensorboard wandb --weight_decay 0.1 --tf32 True"
)


def values(arguments: RunArguments) -> dict[str, dict[str, object]]:
    """The configuration of a run without the origins of its values."""
    sections = load_run(arguments, complete=False, prepare_data=False).to_json()
    return {name: {key: item["value"] for key, item in keys.items()} for name, keys in sections.items()}


def test_a_run_file_means_the_same_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "translate", *WORDS]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert values(RunArguments(file=str(file))) == values(RunArguments(words=tuple(WORDS)))
    assert "# command line: --learning_rate\nlr: " in text
    assert text.count("# default of transformers\n") < text.count("\n") / 4  # one comment for keys that follow
    assert "# tf32: no effect here" in text
    assert "# weight_decay: acts on matrices alone" in text


def test_a_command_means_the_same(capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "translate", "--format", "command", *WORDS]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""), comments=True)
    assert words[:2] == ["fm9g", "train"]
    assert values(RunArguments(words=tuple(words[2:]))) == values(RunArguments(words=tuple(WORDS)))


def test_a_file_of_another_tool_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs, ours = tmp_path / "sft.yaml", tmp_path / "run.yaml"
    theirs.write_text(
        "model_name_or_path: tiny\nstage: sft\nfinetuning_type: full\nlearning_rate: 1.0e-5\nplot_loss: true\n",
        encoding="utf-8",
    )
    command = ["config", "translate", str(theirs), "--output", str(ours)]
    assert main(command) == 0
    assert f"fm9g train {ours}" in capsys.readouterr().out
    assert f"# {theirs}: learning_rate\n" in ours.read_text(encoding="utf-8")
    assert values(RunArguments(file=str(ours))) == values(RunArguments(file=str(theirs)))
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
