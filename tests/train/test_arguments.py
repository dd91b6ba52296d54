"""Every training key changes something: a small run without it and one with it differ in what the key is there for."""

from __future__ import annotations

import re
import threading
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import ROOT, make_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fm9g.checkpoint.manager
import fm9g.engine.base
from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.steps import list_steps
from fm9g.cli import main
from fm9g.config.fields import keys_of
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig
from fm9g.config.train_rules import ADAPTER_KEYS
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.errors import UserError
from fm9g.run_files import read_events, read_metrics
from fm9g.train.runner import TrainResult

Train = Callable[..., TrainResult]
SMALL = {
    "train_iters": 4,
    "save_iters": 4,
    "max_length": 32,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "report_to": "none",
}


@dataclass
class RunArtifacts:
    """What a run left behind and did on its way."""

    steps: int
    losses: list[float | None]
    lines: dict[str, dict[int, float]]
    norms: list[float]
    lrs: list[float]
    checkpoints: list[int]
    files: set[str]
    events: list[str]
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    counts: dict[str, Any]
    logs: str
    folder: str
    output: str
    tags: dict[str, list[int]] = field(default_factory=dict)
    recomputed: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)


@pytest.fixture
def artifacts(train: Train, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    recomputed: list[str] = []
    writers: list[str] = []
    recompute, write = fm9g.engine.base.apply_activation_checkpointing, fm9g.checkpoint.manager.save_checkpoint
    monkeypatch.setattr(
        fm9g.engine.base,
        "apply_activation_checkpointing",
        lambda layer, how: recomputed.append(how) or recompute(layer, how),
    )
    monkeypatch.setattr(
        fm9g.checkpoint.manager,
        "save_checkpoint",
        lambda *given: writers.append(threading.current_thread().name) or write(*given),
    )

    def run(out: str = "out", **changes: object) -> RunArtifacts:
        recomputed.clear()
        writers.clear()
        result = train(out, **{**SMALL, **changes})
        lines = read_metrics(result.metrics_file)
        keys = {key for line in lines for key in line}
        by_key = {key: {line["step"]: line[key] for line in lines if key in line} for key in keys}
        checkpoint = Checkpoint(result.checkpoint) if result.checkpoint else None
        root = result.checkpoint.parent if result.checkpoint else tmp_path / "nowhere"
        return RunArtifacts(
            steps=result.step,
            losses=list(by_key.get("Loss/train", {}).values()),
            lines=by_key,
            norms=list(by_key.get("Optimizer/grad_norm", {}).values()),
            lrs=list(by_key.get("Optimizer/lr", {}).values()),
            checkpoints=list_steps(root),
            files={file.name for file in checkpoint.folder.iterdir()} if checkpoint else set(),
            events=[event["kind"] for event in read_events(result.metrics_file.parent / "events.jsonl")],
            weights=dict(checkpoint.weights()) if checkpoint else {},
            moments=checkpoint.optimizer() if checkpoint and "save_model_only" not in changes else {},
            counts=checkpoint.trainer_state() if checkpoint else {},
            logs=result.metrics_file.parent.name,
            folder=root.name,
            output=str.join("", capfd.readouterr()),
            tags=_tags(result.tensorboard_dir),
            recomputed=list(recomputed),
            writers=list(writers),
        )

    return run


def _tags(folder: Path) -> dict[str, list[int]]:
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found | {tag: [event.step for event in events.Histograms(tag)] for tag in events.Tags()["histograms"]}


def _first(artifacts: RunArtifacts) -> Any:
    return artifacts.losses[0]


def _last(artifacts: RunArtifacts) -> Any:
    return artifacts.losses[-1]


def _loss(step: int) -> Callable[[RunArtifacts], Any]:
    return lambda artifacts: artifacts.losses[step - 1]


# Key: what is given with and without it, the key's value, what of the run must differ, and what must stay.
CHANGES: list[tuple[str, dict[str, Any], Any, Callable[[RunArtifacts], Any], Callable[[RunArtifacts], Any] | None]] = [
    ("model_unique", {}, "other", lambda f: (f.folder, f.logs), _last),
    ("exp_group", {}, "group_", lambda f: f.logs, lambda f: (f.folder, f.losses)),
    ("train_iters", {}, 3, lambda f: f.steps, _first),
    ("stop_iters", {}, 2, lambda f: f.steps, lambda f: (f.lrs[:2], f.losses[:2])),
    ("epochs", {}, 0.5, lambda f: f.steps, _first),
    ("save", {}, False, lambda f: f.checkpoints, _last),
    ("save_iters", {}, 2, lambda f: f.checkpoints, _last),
    ("async_save", {}, True, lambda f: f.writers, lambda f: (f.losses, f.checkpoints, f.files)),
    ("save_total_limit", {"save_iters": 1}, 2, lambda f: f.checkpoints, _last),
    ("save_model_only", {}, True, lambda f: f.files, _last),
    ("log_iters", {}, 2, lambda f: len(f.losses), _last),
    ("seed", {}, 5, _first, lambda f: f.steps),
    ("batch_size", {}, 2, _first, lambda f: f.steps),
    ("max_length", {}, 40, _first, lambda f: f.steps),
    ("gradient_accumulation_steps", {}, 2, _first, lambda f: f.steps),
    ("global_batch_size", {}, 2, _first, lambda f: f.steps),
    ("max_samples", {}, 7, _last, lambda f: f.steps),
    ("lr", {"warmup_iters": 0}, 0.5, lambda f: f.lrs, _first),
    ("lr_scheduler", {}, "Constant", lambda f: f.lrs[-1], lambda f: f.lrs[:3]),
    ("warmup_iters", {}, 0, lambda f: f.lrs, _first),
    ("drop_iters", {"lr_scheduler": "warmupstabledrop", "drop_iters": 1}, 2, lambda f: f.lrs, _first),
    ("drop_begin", {"lr_scheduler": "WarmupStableExp", "drop_iters": 1}, 2, lambda f: f.lrs[3], lambda f: f.lrs[:3]),
    (
        "drop_rate",
        {"lr_scheduler": "WarmupStableExp", "drop_iters": 1, "drop_begin": 2},
        0.1,
        lambda f: f.lrs[3],
        lambda f: f.lrs[:3],
    ),
    ("min_lr_ratio", {}, 0.5, lambda f: f.lrs[-1], lambda f: f.lrs[:3]),
    ("warmup_ratio", {"warmup_iters": 0}, 0.3, lambda f: f.lrs[:3], _first),
    ("lr_power", {"lr_scheduler": "polynomial"}, 3, lambda f: f.lrs[-1], lambda f: f.lrs[:3]),
    ("lr_num_cycles", {"lr_scheduler": "cosine_with_restarts"}, 2, lambda f: f.lrs[-1], lambda f: f.lrs[:3]),
    ("optimizer", {}, "muon", _last, _first),
    ("weight_decay", {}, 0.9, _last, _first),
    ("beta1", {}, 0.1, _last, _first),
    ("beta2", {}, 0.1, _last, _first),
    ("eps", {}, 0.1, _last, _first),
    ("muon_momentum", {"optimizer": "muon"}, 0.1, _last, _first),
    ("sgd_momentum", {"optimizer": "sgd"}, 0.9, _last, _first),
    (
        "decay_norm_and_bias",
        {},
        False,
        lambda f: f.weights["encoder.output_layernorm.weight"].sum().item(),
        _first,
    ),
    ("clip_grad", {}, 0.01, lambda f: f.moments["lm_head.weight.exp_avg"].norm().item(), lambda f: f.norms[0]),
    ("ema_decay", {}, 0.9, lambda f: f.files, _last),
    (
        "freeze",
        {},
        "input_embedding*, encoder.layers.1.*",
        lambda f: f.weights["encoder.layers.1.ffn.ffn.w_out.weight"].sum().item(),
        _first,
    ),
    (
        "trainable_layers",
        {},
        1,
        lambda f: f.weights["encoder.layers.0.ffn.ffn.w_out.weight"].sum().item(),
        _first,
    ),
    ("label_smoothing", {}, 0.3, lambda f: f.norms[0], _first),
    ("z_loss", {}, 0.1, lambda f: f.norms[0], _first),
    ("neftune_alpha", {}, 50.0, _first, lambda f: f.lrs),
    ("train_on", {}, "all", _first, lambda f: f.steps),
    ("report_to", {}, "tensorboard", lambda f: f.tags.keys(), _last),
    (
        "tensorboard_all_tasks",
        {"report_to": "tensorboard"},
        1,
        lambda f: "Epoch/few" in f.tags,
        lambda f: f.lines["Epoch/few"],
    ),
    (
        "inspect_iters",
        {"report_to": "tensorboard"},
        2,
        lambda f: (f.tags.get("weights/lm_head.weight"), "by layer" in f.output),
        _last,
    ),
    ("use_checkpoint", {}, 1, lambda f: f.recomputed, _last),
    ("activation_checkpoint", {}, "selective", lambda f: f.recomputed, _last),
    ("grad_ckpt_num", {"use_checkpoint": 1}, 1, lambda f: f.recomputed, _last),
]


@pytest.mark.parametrize(("key", "given", "value", "differs", "stays"), CHANGES, ids=[case[0] for case in CHANGES])
def test_the_key_changes_what_it_is_there_for(
    artifacts: Any, key: str, given: dict, value: Any, differs: Callable, stays: Callable | None
) -> None:
    before, after = artifacts("before", **given), artifacts("after", **given | {key: value})
    assert differs(before) != differs(after)
    if stays:
        assert stays(before) == stays(after)


def test_the_guides_only_load_model_and_load_dataloader_ckpt(artifacts: Any, tmp_path: Path) -> None:
    artifacts("first")
    source = tmp_path / "first" / "checkpoints" / "m" / "4"
    start = {"pretrained_model": source, "train_iters": 2, "warmup_iters": 0}
    plain = artifacts("plain", **start)
    assert plain.losses[0] < 6
    file = artifacts("file", **start | {"pretrained_model": source / "fm9g_live_checkpoint-4.pt"})
    assert plain.losses == file.losses
    everything = artifacts("everything", **start, only_load_model=0)
    assert everything.losses[0] == plain.losses[0]
    assert everything.losses[1] != plain.losses[1]
    later = artifacts("later", **start, load_dataloader_ckpt=1)
    assert later.losses[0] != plain.losses[0]
    with pytest.raises(UserError, match="is not a checkpoint of a run, and has weights alone"):
        torch.save(plain.weights, tmp_path / "alone.pt")
        artifacts("refused", **start | {"pretrained_model": tmp_path / "alone.pt"}, only_load_model=0)


def test_resuming_with_another_configuration_says_what_changed(artifacts: Any) -> None:
    artifacts("run", stop_iters=2)
    again = artifacts("run", resume_ckpt="auto", lr=0.005, weight_decay=0.0)
    for line in ("lr: was 0.01, is 0.005", "weight_decay: was 0.1, is 0.0", "resuming from"):
        assert line in again.output
    assert "max_length: was" not in again.output
    assert again.events == ["start", "save", "end", "resume", "save", "end"]
    for changes, message in (
        ({"optimizer": "muon"}, "optimizer: was adamw, is muon"),
        ({"model.base": 500}, "base: was 10000.0, is 500"),
    ):
        with pytest.raises(UserError, match=message):
            artifacts("run", resume_ckpt=4, train_iters=6, **changes)
    assert artifacts("run", resume_ckpt=4, train_iters=6, optimizer="muon", resume_no_optimze=1).steps == 6


def test_stop_when_end_ends_with_the_data(artifacts: Any) -> None:
    ended = artifacts("ended", stop_when_end=1, train_iters=500, max_samples=20, save_iters=500, log_iters=500)
    assert 20 < ended.steps < 60
    assert ended.lines["Epoch/few"][ended.steps] == ended.lines["Epoch/many"][ended.steps] == 1.0


def test_epochs_are_what_they_say(artifacts: Any) -> None:
    two = artifacts("two", epochs=2, max_samples=20, log_iters=100)
    assert two.lines["Run/tokens"][two.steps] / 2 == pytest.approx(_an_epoch(two), rel=0.08)


def _an_epoch(artifacts: RunArtifacts) -> float:
    return float(re.search(r"an epoch has about (\d+) tokens", artifacts.output)[1])  # type: ignore[index]


@pytest.fixture
def validation(make_mixture: Callable[..., Path], tmp_path: Path) -> Path:
    mixture = (tmp_path / "mixture.json").read_text()
    path = make_mixture({"v1": make_records(9, 8), "v2": make_records(12, 9)}).rename(tmp_path / "validation.json")
    (tmp_path / "mixture.json").write_text(mixture)
    return path


def test_evaluation_is_token_weighted_and_ends_a_run_that_gets_worse(artifacts: Any, validation: Path) -> None:
    given = {"val_dataset": validation, "train_iters": 8, "save_iters": 2}
    run = artifacts("run", **given, eval_iters=3)
    losses = run.lines["Loss/val"]
    assert list(losses) == [3, 6, 8]
    assert run.lines["Loss/val/v1"][8] != run.lines["Loss/val/v2"][8]
    shares = []
    for step, loss in losses.items():
        one, other = (run.lines[f"Loss/val/{task}"][step] for task in ("v1", "v2"))
        shares.append((loss - other) / (one - other))
    assert shares == pytest.approx([shares[0]] * 3, abs=1e-3)
    assert 0.2 < shares[0] < 0.45  # of the targets, a half is not v1's
    assert run.lines["Perplexity/val"][8] == pytest.approx(torch.tensor(losses[8]).exp().item(), rel=1e-5)
    assert artifacts("other", **given, eval_iters=2).lines["Loss/val"][8] == losses[8]
    assert artifacts("few", **given, eval_iters=2, eval_batches=1).lines["Loss/val"][8] != losses[8]
    assert run.losses == artifacts("without", train_iters=8, save_iters=2).losses
    # A rate that makes everything worse: the best evaluation stays the first.
    worse = {
        **given,
        "lr": 5.0,
        "warmup_iters": 0,
        "lr_scheduler": "constant",
        "eval_iters": 1,
        "max_skipped_steps": 100,
    }
    stopped = artifacts(
        "stopped", **worse | {"save_iters": 1, "train_iters": 30}, early_stopping_patience=2, save_total_limit=1
    )
    assert stopped.steps < 30
    assert "early_stop" in stopped.events
    best = min(stopped.lines["Loss/val"], key=stopped.lines["Loss/val"].get)
    assert stopped.checkpoints == sorted({best, stopped.steps})
    assert stopped.counts["evaluations_since_best"] == 2


def test_a_mistake_in_the_validation_data_is_reported_before_the_first_step(
    artifacts: Any, validation: Path, tmp_path: Path
) -> None:
    data = tmp_path / "indexed" / "v2" / "data.jsonl"
    lines = data.read_bytes().splitlines(keepends=True)
    data.write_bytes(b"".join([*lines[:-1], b"x" * (len(lines[-1]) - 1) + b"\n"]))
    with pytest.raises(UserError, match="line 12"):
        artifacts("run", val_dataset=validation, eval_iters=4)
    assert not (tmp_path / "run" / "logs" / "m" / "metrics.jsonl").exists()


def test_a_gradient_that_is_not_finite_is_skipped_dumped_and_counted(
    artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = fm9g.engine.base.Engine.backward
    calls = iter(range(100))
    bad = {2, 3}
    monkeypatch.setattr(
        "fm9g.engine.fsdp.FSDPEngine.backward",
        lambda self, loss, is_last_micro_batch: backward(
            self, loss * (float("nan") if next(calls) in bad else 1.0), is_last_micro_batch
        ),
    )
    run = artifacts("run", train_iters=6, loss_spike_sigmas=0)
    assert run.events.count("skip") == 2
    assert run.counts["skipped"] == 2
    assert run.norms[2] is None
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())
    assert run.moments["numbers"][0] == 4
    batches = sorted((tmp_path / "run" / "logs" / "m" / "bad_batches").iterdir())
    assert [file.name for file in batches] == ["step-3.rank-0.jsonl", "step-4.rank-0.jsonl"]
    assert '"text": ' in batches[0].read_text()
    calls = iter(range(100))
    with pytest.raises(
        UserError, match="2 steps in a row were skipped, the last because the norm of the gradients is nan"
    ):
        artifacts("other", train_iters=6, max_skipped_steps=2)


def test_a_batch_that_does_not_fit_in_memory_is_skipped_or_ends_the_run(
    artifacts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = fm9g.engine.base.Engine.forward
    calls = iter(range(100))

    def short(self: Any, *given: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *given)

    monkeypatch.setattr("fm9g.engine.fsdp.FSDPEngine.forward", short)
    run = artifacts("run")
    assert run.events.count("oom") == 1
    assert "32 tokens a row; lower batch_size or max_length" in run.output
    assert run.counts["skipped"] == 1
    calls = iter(range(100))
    with pytest.raises(UserError, match="step 2: a row of 32 tokens does not fit in the memory"):
        artifacts("other", ignore_cuda_oom=0)


def test_spikes_are_marked(artifacts: Any) -> None:
    """Warmup to a far too large learning rate: after it, the loss jumps."""
    given = {"train_iters": 24, "lr_scheduler": "constant", "lr": 5, "warmup_iters": 20, "max_skipped_steps": 100}
    assert "spike" in artifacts("marked", **given, loss_spike_sigmas=1).events
    assert "spike" not in artifacts("not", **given, loss_spike_sigmas=0).events


def test_mfu_is_a_share_of_the_peak(artifacts: Any) -> None:
    shares = []
    for peak in (1, 1000):
        run = artifacts(f"peak-{peak}", peak_tflops=peak)
        shares.append(run.lines["Throughput/mfu"][4] / run.lines["Throughput/tokens_per_second"][4])
    assert shares[0] / shares[1] == pytest.approx(1000, rel=0.2)  # rates of documents of other lengths differ a little


def test_flash_none_keeps_the_kernel_away(artifacts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    prepare = fm9g.engine.base.Engine.prepare
    monkeypatch.setattr(
        "fm9g.engine.fsdp.FSDPEngine.prepare",
        lambda self, model, *rest: seen.append(model.config.use_flash_attn) or prepare(self, model, *rest),
    )
    artifacts("cuda", flash="cuda")
    artifacts("none", flash="none")
    assert seen == [True, False]


def test_workers_run_ahead_by_the_prefetch_factor(artifacts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    tokens = EncodingPool.tokenize
    monkeypatch.setattr(EncodingPool, "tokenize", lambda *given: seen.append(given[-1]) or tokens(*given))
    one = artifacts("one", dataloader_num_workers=1, dataloader_prefetch_factor=1)
    seven = artifacts("seven", dataloader_num_workers=1, dataloader_prefetch_factor=7)
    assert set(seen) == {1, 7}
    assert one.losses == seven.losses


# Where the keys are tried that need several processes, other data, or a GPU.
ELSEWHERE = {
    "config": "tests/train/conftest.py",
    "dataset_config": "tests/train/test_runner.py",
    "tokenizer_path": "tests/train/test_runner.py",
    "output_dir": "tests/train/conftest.py",
    "pretrained_model": "tests/train/test_runner.py",
    "strict_state_dict": "tests/train/test_runner.py",
    "resume_ckpt": "tests/train/test_runner.py",
    "overwrite": "tests/train/test_runner.py",
    "only_run_dataloader": "tests/train/test_loader_benchmark.py",
    "token_cache_dir": "tests/data/load/test_token_cache_builder.py",
    "on_data_change": "tests/data/load/test_loader_state.py",
    "dataloader_num_workers": "tests/train/test_runner.py",
    "chat_template": "tests/train/test_chat.py",
    "chat_template_date": "tests/train/test_chat.py",
    "turns": "tests/train/test_chat.py",
    "device": "tests/train/test_runner.py",
    "engine": "tests/train/test_runner.py",
    "zero_level": "tests/engine/test_same_everywhere.py",
    "tp_size": "tests/engine/test_same_everywhere.py",
    "sequence_parallel": "tests/engine/test_same_everywhere.py",
    "offload_optimizer": "tests/train/test_runner.py",
    "loss_scale": "tests/engine/test_gradients.py",
    "loss_scale_steps": "tests/engine/test_gradients.py",
    "n_gpus": "tests/test_apps.py",
    "adapter": "tests/train/test_from_adapter.py",
    **dict.fromkeys(["model", "method"], "tests/shorthand/test_load.py"),
    **dict.fromkeys(["packing", "eval_batch_size", "oversize_rule"], "tests/train/test_without_packing.py"),
    "test_oom_error": "tests/train/test_memory_probe.py",
    "system": "tests/train/test_chat.py",
    "new_tokens": "tests/train/test_new_tokens.py",
    **dict.fromkeys(["lora_layer", *ADAPTER_KEYS], "tests/train/test_adapter_training.py"),
    **dict.fromkeys(
        ["data", "val_data", "val_split", "split_seed", "train_sample", "val_sample", "data_cache_dir"],
        "tests/shorthand/test_data.py",
    ),
    "timeout": "tests/launch/test_agent.py",
    "step_timeout": "tests/launch/test_agent.py",
}


def test_no_key_is_left_out() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    here = {case[0] for case in CHANGES}
    for key in keys_of(TrainConfig).keys() - here - ELSEWHERE.keys():
        assert re.search(rf"\b{key}=|\"{key}\":", source), key
    for key, file in ELSEWHERE.items():
        words = {"loss_scale": "DynamicLossScaler", "loss_scale_steps": "DynamicLossScaler", "n_gpus": "n_gpus"}
        assert words.get(key, key) in (ROOT / file).read_text(encoding="utf-8"), (key, file)


def test_every_name_of_the_guide_is_known(shared: Path, capsys: pytest.CaptureFixture) -> None:
    """What the guide's tables hold, as typed there."""
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    table = guide[guide.index("## 参数详细介绍") : guide.index("## 查看训练情况")]
    given = dict(re.findall(r'args\["(\w+)"\]=\s*"?([^"\n#]*)"?', table))
    assert len(given) == 42
    unknown = given.keys() - keys_of(TrainConfig).keys() - DEPRECATED_KEYS.keys()
    assert not unknown
    arguments = [word for key, value in given.items() if key != "config" for word in (f"--{key}", value.strip())]
    assert main(["config", "show", "--config", "7b", *arguments]) == 0
    output = capsys.readouterr().err
    for key in DEPRECATED_KEYS.keys() & given.keys():
        assert f"{key} changes nothing: {DEPRECATED_KEYS[key]}" in output


def test_short_names_and_contradictions(train: Train) -> None:
    with unittest.mock.patch("fm9g.train.runner.run_training"), pytest.raises(UserError, match="they are the same"):
        train("out", resume="auto", resume_ckpt=4)
    for changes, message in (
        ({"early_stopping_patience": 2}, "early_stopping_patience needs data to evaluate on"),
        ({"report_to": "none,tensorboard"}, "none cannot be combined with a tracker"),
        ({"report_to": "wandbee"}, "report_to: found 'wandbee', expected tensorboard, wandb"),
        ({"freeze": "nothing*"}, "freeze: 'nothing\\*' matches no weight"),
        ({"freeze": "*"}, "freeze: nothing is left to train"),
        ({"freeze": "*layers.1.*", "trainable_layers": 1}, "freeze: nothing is left to train"),
        ({"trainable_layers": -3}, "trainable_layers -3: the model has 2 layers"),
        ({"trainable_layers": 1, "lora_layer": "all", "pretrained_model": "x"}, "trainable_layers and lora_layer are"),
        ({"sgd_momentum": 0.9}, "sgd_momentum is given, and optimizer is adamw: it is a key of sgd"),
        ({"save_iters": 2.5}, "save_iters: found 2.5, expected whole steps, or a fraction of train_iters below 1"),
        ({"resume_ckpt": "newest"}, "expected the number of a step, auto"),
    ):
        with pytest.raises(UserError, match=message):
            train("out", **changes)
