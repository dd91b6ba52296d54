"""`fm9g plan` as a user types it."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT, make_records

from fm9g.cli.run import add_run_options
from fm9g.config.run import load_run
from fm9g.data.load.token_estimates import estimate_total_tokens
from fm9g.errors import UserError
from fm9g.hardware import GIB
from fm9g.plan.command import add_plan_arguments, run_plan
from fm9g.shorthand.load import RunArguments
from fm9g.train.data_loading import open_mixture


def test_planning_needs_no_torch() -> None:
    code = "import sys, fm9g.plan.command, fm9g.doctor.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def command(*words: str, **keys: str) -> int:
    parser = argparse.ArgumentParser()
    add_run_options(parser)
    add_plan_arguments(parser)
    options = parser.parse_args(words)
    return run_plan(options, RunArguments(config=options.config, values=keys))


SEVEN = str(ROOT / "model_configs" / "7b.json")  # not the training settings of that name


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = {"engine": "torch", "use_checkpoint": "true"}
    assert command("--config", "70b", "--nodes", "8", "--gpu", "h100", "--tokens", "2T", **keys) == 0
    text = capsys.readouterr().out
    assert "80.815 B" in text
    assert text.splitlines()[-1].startswith("It fits: ")
    assert "(--tokens, 2 T tokens)" in text
    assert f"{12 * 80_814_546_944 / GIB:.1f} GiB" in text
    picture = tmp_path / "memory.png"
    assert command("--config", SEVEN, "--json", "--plot", str(picture), batch_size="8", engine="torch") == 1
    report = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not report["fits"]
    assert sum(report["memory"].values()) == pytest.approx(report["tensors"], abs=10)
    assert report["suggestions"][0]["fits"]
    assert command("--config", SEVEN, batch_size="8", engine="torch") == 1
    assert report["suggestions"][0]["changes"] in capsys.readouterr().out
    assert command("--config", SEVEN, "--json", batch_size="8", engine="torch", global_batch_size="64") == 1
    changes = [other["changes"] for other in json.loads(capsys.readouterr().out)["suggestions"]]
    assert any("--global_batch_size" in text for text in changes)
    assert not any("--gradient_accumulation_steps" in text for text in changes)


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu", "H10"),
        ("--gpu-memory", "0"),
        ("--gpu-flops", "nan"),
        ("--mfu", "40"),
        ("--tokens", "many"),
        ("--gpus", "0"),
    ],
)
def test_mistakes_on_the_command_line(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        command("--config", "7b", *words)


@pytest.mark.parametrize(
    ("keys", "steps", "words"),
    [
        ({}, 10_000, "10,000 steps of 393,216 tokens (train_iters, 3.93 B tokens) take about 2.1 days on 8 x A100"),
        ({"stop_iters": "100"}, 100, "100 steps of 393,216 tokens (stop_iters, 39.3 M tokens) take about 30.8 minutes"),
        ({"epochs": "2"}, None, "How long the run takes is unknown: the data of epochs 2 cannot be read here"),
        ({"train_iters": "1", "max_length": "16"}, 1, "1 step of 1,536 tokens (train_iters, 1,536 tokens) take"),
    ],
)
def test_the_last_line_says_whether_it_fits_and_how_long_it_takes(
    keys: dict, steps: int | None, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert command("--config", "7b", "--gpus", "8", **keys) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("It fits: ")
    assert " of the 80 GiB of each A100 (assumed, not measured). " in last
    assert words in last
    assert command("--config", "7b", "--gpus", "8", "--json", **keys) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == steps
    assert (report["days"] is None) == (steps is None)


def test_epochs_are_as_long_as_the_data(make_mixture, tokenizer_path: Path, capsys: pytest.CaptureFixture) -> None:
    mixture = make_mixture({"few": make_records(50, 1)})
    keys = {"dataset_config": str(mixture), "tokenizer_path": str(tokenizer_path), "max_length": "64"}
    tokens = []
    for epochs in (4, 8):
        assert command("--config", "tiny", "--json", **keys, epochs=str(epochs)) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.1)
    run = load_run("tiny", {**keys, "epochs": "4"})
    assert tokens[0] / (4 * 64) == run.train.iters_for_epochs(estimate_total_tokens(open_mixture(run)), 4 * 64)


def test_without_gpus_the_run_has_as_many_as_its_n_gpus(capsys: pytest.CaptureFixture) -> None:
    command("--config", "7b", "--json")
    assert json.loads(capsys.readouterr().out)["setup"]["gpus"] == 4


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture) -> None:
    assert command("--config", "7b", "--gpus", "1", "--gpu", "4090", engine="torch") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(
        "It does not fit: 125.9 of the 24 GiB of each 4090 (assumed, not measured). 10,000 steps"
    )
    ways = lines[lines.index("What would fit:") + 1 : -2]
    assert [way.split(",")[0] for way in ways] == [
        "  LoRA on a pretrained model",
        "  QLoRA on a pretrained model",
        "  as it is",
    ]
    for way in ways[:2]:  # each is what it says
        size = way.rpartition(": ")[2].removesuffix(" GiB")
        words = way.rpartition(": ")[0].split(",", 1)[1].split()
        keys = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2])}
        command("--config", "7b", "--gpus", "1", "--gpu", "4090", engine="torch", pretrained_model="x", **keys)
        assert f"It fits: {size} of the 24 GiB" in capsys.readouterr().out.splitlines()[-1]
