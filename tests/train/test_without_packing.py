"""Whole runs without packing: the steps and trained tokens are those of transformers' Trainer on the same records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.common import make_records

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights
from fm9g.run_files import read_metrics
from fm9g.train.runner import TrainResult

KEYS = {"packing": False, "batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 256, "report_to": "none"}
RECORDS = 53


@pytest.fixture
def train_unpacked(train: Callable[..., TrainResult], make_mixture: Callable[..., Path]) -> Callable[..., TrainResult]:
    mixture = make_mixture({"one": make_records(RECORDS, 5)})
    return lambda out, **changes: train(out, **{**KEYS, "dataset_config": mixture, **changes})


def test_steps_and_tokens_of_epochs_are_exact(train_unpacked: Callable[..., TrainResult], tokenizer_path: Path) -> None:
    result = train_unpacked("out", epochs=3)
    assert result.step == 3 * 7  # ceil(53 / (4 * 2)) steps per epoch
    tokenizer = load_tokenizer(str(tokenizer_path))
    lengths = [
        len(tokenizer.encode(record["input"])) + len(tokenizer.encode(record["output"]))
        for record in make_records(RECORDS, 5)
    ]
    assert result.tokens == 3 * sum(length + 1 for length in lengths)  # bos is an input, eos a target


def test_resume_equals_never_having_stopped(train_unpacked: Callable[..., TrainResult]) -> None:
    whole = train_unpacked("whole", train_iters=10, save_iters=10)
    train_unpacked("parts", train_iters=10, stop_iters=6, save_iters=6)
    resumed = train_unpacked("parts", train_iters=10, save_iters=10, resume_ckpt="auto")
    one, other = (read_weights(Checkpoint(result.checkpoint).weight_file) for result in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_do_not_change_a_step(train_unpacked: Callable[..., TrainResult]) -> None:
    keys = {"train_iters": 7, "model.dropout_p": 0, "warmup_iters": 0, "lr": 1e-3}
    one = train_unpacked("one", **keys)
    accumulated = train_unpacked("other", batch_size=2, gradient_accumulation_steps=4, **keys)
    losses = [
        [line["Loss/train"] for line in read_metrics(result.metrics_file) if "Loss/train" in line]
        for result in (one, accumulated)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batch_size(
    train_unpacked: Callable[..., TrainResult], tmp_path: Path
) -> None:
    keys = {"train_iters": 1, "val_dataset": tmp_path / "mixture.json", "lr": 0}
    losses = []
    for size in (0, 1, 7):
        metrics = read_metrics(train_unpacked(f"out{size}", eval_batch_size=size, **keys).metrics_file)
        losses.append(metrics[-1]["Loss/val"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"train_iters": 20, "stop_when_end": True}, 7),
        ({"epochs": 2, "max_samples": 20}, 2 * 3),
        ({"epochs": 1, "token_cache_dir": "cache"}, 7),
    ],
)
def test_other_keys_of_the_length_go_with_it(
    train_unpacked: Callable[..., TrainResult], tmp_path: Path, keys: dict, steps: int
) -> None:
    keys = {key: tmp_path / value if key.endswith("_dir") else value for key, value in keys.items()}
    assert train_unpacked("out", **keys).step == steps


def test_the_length_of_an_epoch_is_said_in_records(
    train_unpacked: Callable[..., TrainResult], capsys: pytest.CaptureFixture[str]
) -> None:
    train_unpacked("out", epochs=1)
    printed = capsys.readouterr().err
    assert "epochs 1: train_iters 7; an epoch has 53 records\n" in printed
    assert "at most 2048 tokens per step: batch_size 4 x max_length 256" in printed


def test_long_records_are_handled_as_the_run_says(train_unpacked: Callable[..., TrainResult]) -> None:
    tokens = {
        rule: train_unpacked(rule, epochs=1, max_length=16, oversize_rule=rule).tokens
        for rule in ("drop", "head", "tail")
    }
    assert tokens["drop"] < tokens["head"] < tokens["tail"] <= RECORDS * 16  # tail also keeps records with a long input


def test_validation_data_without_a_sample_ends_the_run_before_its_first_step(
    train_unpacked: Callable[..., TrainResult], tmp_path: Path
) -> None:
    keys = {"val_dataset": tmp_path / "mixture.json", "max_length": 4, "oversize_rule": "drop"}
    with pytest.raises(UserError, match=r"val_dataset: none of the validation records gives a sample \(35 of them"):
        train_unpacked("out", **keys)
    assert not list((tmp_path / "out").glob("checkpoints/m/[0-9]*"))


def test_a_run_in_which_no_record_gives_a_sample_fails(train_unpacked: Callable[..., TrainResult]) -> None:
    with pytest.raises(UserError, match="nothing was trained on in 7 steps: no record gave a sample; raise max_length"):
        train_unpacked("out", epochs=1, max_length=4, oversize_rule="drop")
