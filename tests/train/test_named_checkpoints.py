"""`best` and `last` where a checkpoint is meant, and checkpoints without what is not needed of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.find import find_path, resolve_checkpoint_path
from fm9g.checkpoint.layout import file_name
from fm9g.cli import main
from fm9g.cli.run import print_result
from fm9g.errors import UserError
from fm9g.train.runner import TrainResult

Train = Callable[..., TrainResult]


@pytest.fixture
def stopped(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainResult:
    """A run that early_stopping_patience ended: its best checkpoint is 2, and of the others the last one is kept."""
    losses = iter([1.0, 2.0, 2.0, 3.0])
    with monkeypatch.context() as patch:
        patch.setattr("fm9g.train.evaluator.Evaluator.run", lambda self: {"Loss/val": next(losses)})
        validation = {"val_dataset": tmp_path / "mixture.json", "eval_iters": 2, "early_stopping_patience": 3}
        return train("out", **validation, save_iters=2, save_total_limit=2)


def test_the_last_lines_of_a_run_that_stopped_early_name_the_best_checkpoint(
    stopped: TrainResult, capsys: pytest.CaptureFixture
) -> None:
    root = stopped.metrics_file.parents[2] / "checkpoints" / "m"
    assert (stopped.checkpoint, stopped.best_checkpoint) == (root / "8", root / "2")
    assert sorted(int(step.name) for step in root.iterdir()) == [2, 8]
    print_result(stopped)
    lines = capsys.readouterr().out.splitlines()
    assert f"checkpoint: {root / '8'}" in lines
    assert f"best checkpoint, by validation loss: {root / '2'}" in lines
    shutil.rmtree(root / "2")
    assert resolve_checkpoint_path(root / "best") == root / "8"  # what is deleted is never named


def test_best_and_last_are_paths_wherever_a_checkpoint_is_meant(
    stopped: TrainResult, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = stopped.metrics_file.parents[2] / "checkpoints" / "m"
    assert (find_path(root / "best"), find_path(root / "last")) == (root / "2", root / "8")
    for words, expected in (
        (["convert", root / "best", tmp_path / "hf"], "hf: "),
        (["ckpt", "show", root / "best"], f"{root / '2'}\n"),
        (["ckpt", "verify", root / "last"], f"{root / '8'}: complete"),
    ):
        assert main([str(word) for word in words]) == 0
        assert expected in capsys.readouterr().out
    assert main(["ckpt", "diff", str(root / "2"), str(root / "best")]) == 0
    assert "all bits equal" in capsys.readouterr().out
    assert main(["generate", str(root / "best"), "--prompt", "the", "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("the")

    adapters = {"lora_layer": '["project_q"]', "train_iters": 2, "save_iters": 1}
    lora = train("lora", pretrained_model=root / "best", **adapters)
    assert lora.checkpoint is not None
    saved = Checkpoint(lora.checkpoint).run_config()["train"]["pretrained_model"]["value"]
    assert saved == str(root / "2")
    merged = ["lora", "merge", str(root / "best"), str(lora.checkpoint.parent / "last"), str(tmp_path / "m.pt")]
    assert main(merged) == 0
    more = train("more", pretrained_model=root / "best", adapter=lora.checkpoint.parent / "last", train_iters=1)
    assert more.checkpoint is not None
    assert Checkpoint(more.checkpoint).run_config()["train"]["adapter"]["value"] == str(lora.checkpoint)
    # By its name in data/checkpoints.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "checkpoints").symlink_to(root.parent)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint_path(Path("m/best")) == Path("data/checkpoints/m/2")
    assert resolve_checkpoint_path(Path("m/8")) == Path("data/checkpoints/m/8")


def test_a_run_resumes_from_its_best_or_its_last_checkpoint(stopped: TrainResult, train: Train, tmp_path: Path) -> None:
    assert stopped.checkpoint is not None
    for name, step in (("last", 8), ("best", 2)):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        result = train(name, resume_ckpt=name, train_iters=step + 1, lr=0.01)
        assert result.step == step + 1
    for name, message in (("last", "has no checkpoint to resume from"), ("best", "has no checkpoint")):
        with pytest.raises(UserError, match=message):
            train("empty", resume_ckpt=name)
    with pytest.raises(UserError, match="no checkpoint of step 3; there are: 2, 8"):
        train("out", resume_ckpt=3)


def test_a_run_without_evaluations_has_no_best_checkpoint(train: Train) -> None:
    result = train("out", train_iters=2)
    assert result.best_checkpoint is None
    assert result.checkpoint is not None
    with pytest.raises(UserError, match=r"no checkpoint has a validation loss.*its steps: 2.*val_dataset"):
        resolve_checkpoint_path(result.checkpoint.parent / "best")


def test_last_passes_over_what_is_cut_short(train: Train) -> None:
    result = train("out", train_iters=2, save_iters=1)
    assert result.checkpoint is not None
    root = result.checkpoint.parent
    (root / "2" / file_name(2, "weights")).write_bytes(b"")
    assert resolve_checkpoint_path(root / "last") == root / "1"
    (root / "1" / "manifest.json").write_text(json.dumps({"step": 1, "files": {"none": [1, "0"]}}), encoding="utf-8")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        resolve_checkpoint_path(root / "last")


def test_a_deleted_optimizer_is_missed_only_where_it_is_needed(train: Train, tmp_path: Path) -> None:
    result = train("out", train_iters=2)
    assert result.checkpoint is not None
    (result.checkpoint / file_name(2, "optimizer")).unlink()
    for resume in (2, "auto"):
        with pytest.raises(UserError, match="or continue without it \\(--resume_no_optimze true\\)"):
            train("out", resume_ckpt=resume, train_iters=3)
    assert main(["convert", str(result.checkpoint), str(tmp_path / "hf")]) == 0
    assert resolve_checkpoint_path(result.checkpoint.parent / "last") == result.checkpoint
    assert train("other", pretrained_model=result.checkpoint, train_iters=1).step == 1
    assert train("out", resume_ckpt="auto", resume_no_optimze=1, train_iters=3).step == 3
