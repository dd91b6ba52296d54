"""Whole runs: resume equals never having stopped, figures reach every sink, mistakes are refused."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from helpers.common import make_records
from safetensors.torch import load_file

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.steps import list_steps, open_checkpoint
from fm9g.convert.hf_export import export_folder
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights
from fm9g.run_files import read_events, read_metrics
from fm9g.train.runner import TrainResult

STEPS = 12


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return read_weights(Checkpoint(result.checkpoint).weight_file)


Train = Callable[..., TrainResult]


def deterministic_metrics(result: TrainResult) -> list[dict]:
    measured = ("Throughput/", "Time/", "Memory/")
    lines = read_metrics(result.metrics_file)
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    assert deterministic_metrics(one) == deterministic_metrics(other)
    assert (one.checkpoint, other.checkpoint) != (None, None)
    some, others = weights(one), weights(other)
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)
    assert _weight_bytes(one) == _weight_bytes(other)
    assert _position(one) == _position(other)
    state, other_state = _optimizer(one), _optimizer(other)
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def _weight_bytes(result: TrainResult) -> bytes:
    assert result.checkpoint is not None
    return Checkpoint(result.checkpoint).weight_file.read_bytes()


def _position(result: TrainResult) -> dict:
    assert result.checkpoint is not None
    return Checkpoint(result.checkpoint).loader_state()


def _optimizer(result: TrainResult) -> dict:
    assert result.checkpoint is not None
    return Checkpoint(result.checkpoint).optimizer()


@pytest.fixture
def full_run(train: Train) -> TrainResult:
    return train("whole")


@pytest.mark.parametrize("stop", [1, 7])
@pytest.mark.parametrize("scheduler", ["cosine", "warmupstabledrop"])
def test_resume_equals_never_having_stopped(train: Train, stop: int, scheduler: str) -> None:
    """Step 1 lies in the middle of the first epoch; at step 7 an epoch of `few` has ended."""
    first = train("parts", stop_iters=stop, lr_scheduler=scheduler, drop_iters=4)
    num_started = sum(state["begun"][0] for state in _position(first)["streams"].values())
    assert (num_started < 50) == (stop == 1)
    assert any(state["waiting"] for state in _position(first)["streams"].values())
    second = train("parts", resume_ckpt=first.step, lr_scheduler=scheduler, drop_iters=4)
    assert_same_run(train("whole", lr_scheduler=scheduler, drop_iters=4), second)


def test_resume_with_workers_and_recomputed_activations_is_the_same_run(train: Train, full_run: TrainResult) -> None:
    first = train("parts", stop_iters=5, dataloader_num_workers=2)
    assert_same_run(full_run, train("parts", resume_ckpt=first.step, dataloader_num_workers=1, use_checkpoint=1))


def test_the_test_of_resuming_can_fail(train: Train, full_run: TrainResult) -> None:
    first = train("parts", stop_iters=5)
    second = train("parts", resume_ckpt=first.step, resume_no_optimze=1)
    assert deterministic_metrics(full_run)[:5] == deterministic_metrics(second)[:5]
    assert deterministic_metrics(full_run)[-1]["Loss/train"] != deterministic_metrics(second)[-1]["Loss/train"]


def test_recomputing_activations_changes_no_figure(train: Train, full_run: TrainResult) -> None:
    assert_same_run(full_run, train("other", use_checkpoint="1", grad_ckpt_num=1))


def test_the_loss_falls_and_every_sink_has_the_same_figures(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train("out", train_iters=40, lr=0.03, exp_group="group_")
    lines = read_metrics(result.metrics_file)
    assert lines[-1]["Loss/train"] < lines[0]["Loss/train"] - 1
    assert result.tensorboard_dir == result.metrics_file.parents[2] / "tensorboard" / "group_m"
    events = EventAccumulator(str(result.tensorboard_dir)).Reload()
    tags = {"Loss/train", "Loss/train/few", "Loss/train/many", "Optimizer/lr", "Optimizer/grad_norm", "Optimizer/scale"}
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == [line["step"] for line in lines if tag in line]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(
            [line[tag] for line in lines if tag in line]
        )


def test_a_checkpoint_holds_what_the_format_says(train: Train, full_run: TrainResult, tokenizer_path: Path) -> None:
    assert full_run.checkpoint is not None
    assert {
        str(file.relative_to(full_run.checkpoint)) for file in full_run.checkpoint.rglob("*") if file.is_file()
    } == {
        f"fm9g_live_checkpoint-{STEPS}.pt",
        f"fm9g_live_checkpoint-{STEPS}.rank-0.opt",
        f"fm9g_live_checkpoint-{STEPS}.log_ckpt",
        "data_position.json",
        "config.json",
        "run_config.json",
        "manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    counts = Checkpoint(full_run.checkpoint).trainer_state()
    assert counts["iteration"] == STEPS
    assert counts["global_token_pass"] == sum(counts["global_total_task_token"].values()) == full_run.tokens
    assert 0.9 * STEPS * 2 * 2 * 64 < full_run.tokens <= STEPS * 2 * 2 * 64
    few = counts["global_total_task_token"]["few"] / full_run.tokens
    assert few == pytest.approx(0.5 / 1.5, abs=0.06)


def test_counts_go_on_after_a_resume(train: Train, full_run: TrainResult) -> None:
    first = train("parts", stop_iters=5)
    second = train("parts", resume_ckpt=5)
    assert first.tokens + second.tokens == full_run.tokens
    assert full_run.checkpoint is not None
    assert second.checkpoint is not None
    assert Checkpoint(second.checkpoint).trainer_state() == Checkpoint(full_run.checkpoint).trainer_state()


def test_datasets_without_repeat_end_the_run_with_a_checkpoint(train: Train, make_mixture: Callable[..., Path]) -> None:
    once = make_mixture(
        {"few": make_records(30, 1), "many": make_records(20, 2)},
        few={"allow_repeat": False},
        many={"allow_repeat": False},
    )
    result = train("out", dataset_config=once, train_iters=1000)
    assert 1 < result.step < 20
    assert result.checkpoint is not None
    streams = Checkpoint(result.checkpoint).loader_state()["streams"].values()
    assert np.sum([state["begun"] for state in streams], axis=0).tolist() == [30, 20]
    assert not any(state["waiting"] for state in streams)


def test_pretrained_weights_are_the_start(
    train: Train, full_run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert full_run.checkpoint is not None
    source = Checkpoint(full_run.checkpoint).weight_file
    capsys.readouterr()
    result = train("tuned", pretrained_model=source, train_iters=1, lr=0)
    assert f"weights: {source}\n" in capsys.readouterr().err
    train("new", train_iters=1)
    assert "weights: random, since pretrained_model is empty" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"none.pt: no such file or folder; `python hgface_2_bmtrain.py` or"):
        train("none", pretrained_model=tmp_path / "none.pt")
    padded = {**torch.load(source), "lm_head.weight": torch.ones(3, 3)}
    torch.save(padded, tmp_path / "wide.pt")
    (tmp_path / "wide.json").write_text("{}")
    with pytest.raises(UserError, match=r"shape \[3, 3\](.|\n)*wide.json describes the model: --config .*wide.json"):
        train("none", pretrained_model=tmp_path / "wide.pt")
    given, saved = read_weights(source), weights(result)
    assert all(torch.equal(given[name], saved[name]) for name in given)
    part = {name: tensor for name, tensor in given.items() if name != "lm_head.weight"} | {"odd": torch.ones(1)}
    torch.save(part, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        train("strict", pretrained_model=tmp_path / "part.pt")
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "hf.pt")
    (tmp_path / "empty.pt").touch()
    for name, message in (("hf.pt", "has no weight of the model"), ("empty.pt", "the file is empty")):
        with pytest.raises(UserError, match=message):
            train("none", pretrained_model=tmp_path / name, strict_state_dict=0)
    with pytest.raises(UserError, match=r"found the checkpoints of a run, .*Give one of them: .*/m/12"):
        train("none", pretrained_model=full_run.checkpoint.parent)
    train("lenient", pretrained_model=tmp_path / "part.pt", strict_state_dict=0, train_iters=1)
    assert "odd is not part of the model" in capsys.readouterr().err


def test_saving_every_few_steps_and_not_at_all(train: Train, tmp_path: Path) -> None:
    train("out", save_iters=5)
    assert list_steps(tmp_path / "out" / "checkpoints" / "m") == [5, 10, 12]
    assert train("none", save=False).checkpoint is None
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_log_lines_come_every_log_iters_and_at_the_end(train: Train) -> None:
    assert [line["step"] for line in deterministic_metrics(train("out", log_iters=5))] == [5, 10, 12]


def test_a_run_that_has_checkpoints_is_not_started_anew_unasked(
    train: Train, full_run: TrainResult, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has checkpoints of steps 12; resume with --resume auto"):
        train("whole")
    train("whole", overwrite=True, train_iters=3)
    assert list_steps(tmp_path / "whole" / "checkpoints" / "m") == [3]


def test_ctrl_c_saves_between_two_steps(train: Train, tmp_path: Path) -> None:
    def interrupt() -> None:
        log = tmp_path / "out" / "logs" / "m" / "metrics.jsonl"
        while not (log.is_file() and log.stat().st_size):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = train("out", train_iters=100_000)
    thread.join()
    assert 0 < result.step < 100_000
    assert open_checkpoint(tmp_path / "out" / "checkpoints" / "m", result.step).step == result.step


def test_sigusr1_saves_and_goes_on(train: Train, tmp_path: Path) -> None:
    root, log = tmp_path / "out" / "checkpoints" / "m", tmp_path / "out" / "logs" / "m" / "metrics.jsonl"

    def ask() -> None:
        while not (log.is_file() and log.stat().st_size):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        while not list_steps(root):  # it is there while the run goes on
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=ask)
    thread.start()
    result = train("out", train_iters=100_000, save_iters=100_000)
    thread.join()
    first, last = list_steps(root)
    assert 0 < first < last == result.step
    assert result.interrupted
    assert signal.getsignal(signal.SIGUSR1) == before
    kinds = [event["kind"] for event in read_events(log.with_name("events.jsonl"))]
    assert kinds == ["start", "save", "save", "signal"]


def test_auto_starts_anew_goes_on_and_passes_over_what_is_damaged(
    train: Train, full_run: TrainResult, capsys: pytest.CaptureFixture
) -> None:
    first = train("parts", resume_ckpt="auto", save_iters=4, stop_iters=8)
    assert first.checkpoint is not None
    file = Checkpoint(first.checkpoint).weight_file
    file.write_bytes(file.read_bytes()[:-10])
    capsys.readouterr()
    second = train("parts", resume_ckpt="auto")
    output = capsys.readouterr().err
    assert "the checkpoint is damaged" in output
    assert "resuming from" in output
    assert f"{first.checkpoint.parent / '4'}" in output
    assert_same_run(full_run, second)


def test_the_mean_of_the_weights_can_be_exported(train: Train, tmp_path: Path) -> None:
    result = train("out", ema_decay=0.5, train_iters=3)
    assert result.checkpoint is not None
    ema = Checkpoint(result.checkpoint).ema_weights()
    assert ema.keys() == weights(result).keys()
    assert not torch.equal(ema["lm_head.weight"], weights(result)["lm_head.weight"])
    export_folder(result.checkpoint / "fm9g_live_checkpoint-3.ema.pt", tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], ema["lm_head.weight"])
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_hugging_face_folder_is_a_start(train: Train, full_run: TrainResult, tmp_path: Path) -> None:
    assert full_run.checkpoint is not None
    export_folder(full_run.checkpoint, tmp_path / "hf")
    start = {"train_iters": 2, "warmup_iters": 0}
    expected = train("pt", pretrained_model=Checkpoint(full_run.checkpoint).weight_file, **start)
    assert deterministic_metrics(train("hf_run", pretrained_model=tmp_path / "hf", **start)) == deterministic_metrics(
        expected
    )
    with pytest.raises(UserError, match=r"config.json describes another model: base is 10000.0, the run's 20000"):
        train("other", pretrained_model=tmp_path / "hf", **start | {"model.base": 20000})


@pytest.mark.parametrize(
    "name", ["fm9g_live_checkpoint-12.pt", "fm9g_live_checkpoint-12.rank-0.opt", "data_position.json"]
)
def test_a_checkpoint_cut_in_half_is_refused(train: Train, full_run: TrainResult, name: str) -> None:
    assert full_run.checkpoint is not None
    file = full_run.checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{name}: has \d+ of \d+ bytes; the checkpoint is damaged"):
        train("whole", resume_ckpt=12)
    file.unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        train("whole", resume_ckpt=12)


def test_a_missing_step_lists_those_that_are_there(train: Train, full_run: TrainResult) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are: 12"):
        train("whole", resume_ckpt=7)


def test_a_failed_save_leaves_the_old_checkpoint(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train("out", stop_iters=4)
    save = torch.save

    def full(content: dict, file: BinaryIO) -> None:
        save(content, file)
        if "numbers" in content:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"the last checkpoint could not be written .*: the disk is full"):
        train("out", resume_ckpt=4)
    monkeypatch.undo()
    root = tmp_path / "out" / "checkpoints" / "m"
    assert [folder.name for folder in root.iterdir()] == ["4"]
    assert_same_run(train("whole"), train("out", resume_ckpt=first.step))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"resume_ckpt": 12, "gradient_accumulation_steps": 4}, "packs per step: was 2, is 4"),
        ({"resume_ckpt": 12, "seed": 5}, "seed: was 1234, is 5"),
        ({"resume_ckpt": 12, "model.num_layers": 3}, "num_layers: was 2, is 3"),
        ({"model.vocab_size": 100}, "the model's vocab_size is 100"),
        ({"engine": "bmtrain"}, "bmtrain needs NVIDIA GPUs, and this is a CPU"),
        ({"offload_optimizer": True}, "the weights are in the host's memory already"),
        ({"tp_size": 2}, "tp_size 2 does not divide the number of processes, 1"),
        ({"tokenizer_path": "nowhere"}, "nowhere: no such tokenizer"),
        ({"dataset_config": "nowhere"}, "'nowhere' is neither a file nor a name in dataset_configs/"),
    ],
)
def test_what_does_not_fit_is_refused(train: Train, full_run: TrainResult, changes: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        train("whole" if "resume_ckpt" in changes else "other", **changes)


def test_a_cuda_device_that_is_not_there_is_refused(train: Train) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="torch sees no GPU here"):
        train("out", device="cuda")


def test_overwrite_deletes_only_checkpoints_and_only_when_there_is_a_new_one(train: Train, tmp_path: Path) -> None:
    root = tmp_path / "out" / "checkpoints" / "m"
    train("out", save_iters=5)
    (root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="nowhere"):
        train("out", overwrite=True, tokenizer_path="nowhere")
    train("out", overwrite=True, save=False, train_iters=1)
    assert list_steps(root) == [5, 10, 12]
    train("out", overwrite=True, train_iters=5)
    assert list_steps(root) == [5]
    assert (root / "notes.txt").exists()


def test_the_figures_of_an_earlier_run_of_that_name_are_kept(train: Train, full_run: TrainResult) -> None:
    before = full_run.metrics_file.read_text()
    train("whole", save=False, train_iters=1)
    assert full_run.metrics_file.with_name("metrics.jsonl.old").read_text() == before


@pytest.mark.parametrize("name", ["fm9g_live_checkpoint-12.pt", "config.json"])
def test_a_changed_byte_in_a_checkpoint_is_noticed(train: Train, full_run: TrainResult, name: str) -> None:
    assert full_run.checkpoint is not None
    content = bytearray((full_run.checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (full_run.checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: its content has changed"):
        train("whole", resume_ckpt=12, train_iters=14)


def test_a_renamed_checkpoint_and_a_broken_manifest_are_refused(full_run: TrainResult) -> None:
    assert full_run.checkpoint is not None
    moved = full_run.checkpoint.rename(full_run.checkpoint.with_name("7"))
    with pytest.raises(UserError, match="is the checkpoint of step 12; rename the folder to 12"):
        Checkpoint(moved)
    for content in ("{}", "[]", '{"step": 7, "files": null}'):
        (moved / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest.json: not a manifest"):
            Checkpoint(moved)


def test_a_diverged_run_stops_and_saves_nothing(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="10 steps in a row were skipped"):
        train("out", lr=1e30, warmup_iters=0, train_iters=50)
    assert list_steps(tmp_path / "out" / "checkpoints" / "m") == []


def test_a_run_without_anything_to_train_on_is_an_error(train: Train, make_mixture: Callable[..., Path]) -> None:
    nothing = make_mixture({"few": [{"input": "x", "output": ""}]}, few={"allow_repeat": False})
    with pytest.raises(UserError, match="nothing was trained on"):
        train("out", dataset_config=nothing)


def test_a_place_that_cannot_be_written_is_noticed_before_the_first_step(train: Train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        train("out")
    assert not (tmp_path / "out" / "logs").exists()


def test_bf16_resumes_exactly_too(train: Train) -> None:
    settings = {"model.half_type": "bf16"}
    first = train("parts", stop_iters=5, **settings)
    assert_same_run(train("whole", **settings), train("parts", resume_ckpt=first.step, **settings))
