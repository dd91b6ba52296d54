"""Runs that start from an adapter: from wherever it is, with its layers and rank, and as exact as any other run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.common import small_model

from fm9g.cli import main
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.run import load_run
from fm9g.convert.adapters import import_peft, read_adapter
from fm9g.convert.hf_export import export_folder
from fm9g.convert.merge import merge
from fm9g.convert.peft import write_peft
from fm9g.convert.run_adapter import with_adapter
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.lora.adapter_file import Adapter, combine, save_adapter
from fm9g.model.transformer import FM9G
from fm9g.run_files import read_metrics
from fm9g.train.runner import TrainResult

GIVEN = {"lora_layer": '["project_q", "w_out"]', "lora_r": 3, "lora_alpha": 6}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = small_model(dropout=0.1, scale=True, base_hidden_size=16)
    (tmp_path / "base.json").write_text(json.dumps(config.to_json()))
    model = FM9G(config)
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=5)
    write_weights(tmp_path / "base.pt", weights := dict(model.named_parameters()), weights.items())
    return tmp_path / "base.pt"


@pytest.fixture
def first(train: Callable[..., TrainResult], base: Path) -> Callable[..., Path]:
    """first(key=value, ...): the checkpoint of a run that made an adapter of `base`."""

    def run(**changes: object) -> Path:
        result = train("first", **{"pretrained_model": base, "lr": 0.02, "train_iters": 3, **GIVEN, **changes})
        assert result.checkpoint is not None
        return result.checkpoint

    return run


@pytest.fixture
def go_on(train: Callable[..., TrainResult], base: Path) -> Callable[..., TrainResult]:
    """go_on(out, adapter, key=value, ...): a run that starts from an adapter."""

    def run(out: str, adapter: Path, **changes: object) -> TrainResult:
        return train(
            out, **{"pretrained_model": base, "adapter": adapter, "lr": 0.02, "train_iters": 4, "seed": 9, **changes}
        )

    return run


def losses(result: TrainResult) -> list[float]:
    return [line["Loss/train"] for line in read_metrics(result.metrics_file) if "Loss/train" in line]


def content(result: TrainResult) -> bytes:
    assert result.checkpoint is not None
    return next(result.checkpoint.glob("*checkpoint-*.pt")).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_an_adapter_is_the_same_wherever_it_is(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], base: Path, tmp_path: Path, kind: str
) -> None:
    checkpoint = first(**KINDS[kind])
    write_peft(read_adapter(checkpoint), tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "imported", base, overwrite=False)
    shutil.copytree(tmp_path / "peft", tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.safetensors").unlink()
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "peft" / "adapter_model.safetensors"), tmp_path / "bin" / "adapter_model.bin")
    runs = {
        name: go_on(name, where)
        for name, where in (
            ("ours", checkpoint),
            ("peft", tmp_path / "peft"),
            ("imported", tmp_path / "imported"),
            ("bin", tmp_path / "bin"),
        )
    }
    assert runs["ours"].step == 4
    for run in runs.values():
        assert losses(run) == losses(runs["ours"])
        assert content(run) == content(runs["ours"])
    described = json.loads((runs["peft"].checkpoint / ADAPTER_CONFIG).read_text())  # type: ignore[operator]
    assert described["target_modules"] == ["project_q", "w_out"]
    assert (described["r"], described["lora_alpha"], len(described["base_sha256"])) == (3, 6, 64)
    assert described["use_rslora"] == (kind == "rslora")
    assert described["use_dora"] == (kind == "dora")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_the_merged_model(
    first: Callable[..., Path],
    go_on: Callable[..., TrainResult],
    train: Callable[..., TrainResult],
    base: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    checkpoint = first(**KINDS[kind])
    merge(base, read_adapter(checkpoint), tmp_path / "merged.pt")
    changes = {"train_iters": 1, "seed": 9, "save": False}
    merged = losses(train("merged", pretrained_model=tmp_path / "merged.pt", **changes))
    plain = losses(train("plain", pretrained_model=base, **changes))
    found = losses(go_on("adapter", checkpoint, **changes))
    assert found == pytest.approx(merged, abs=1e-5)
    assert abs(found[0] - plain[0]) > 1e-3


def test_no_step_leaves_the_adapter_as_it_was(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], tmp_path: Path
) -> None:
    """A learning rate of 0 is one step that changes nothing."""
    checkpoint = first()
    write_peft(read_adapter(checkpoint), tmp_path / "peft")
    result = go_on("still", tmp_path / "peft", train_iters=1, lr=0.0)
    one, other = read_adapter(checkpoint).weights, read_adapter(result.checkpoint).weights  # type: ignore[arg-type]
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


_KINDS = {"quantization": "nf4", "lora_dropout": 0.2, "loraplus_lr_ratio": 4.0}


@pytest.mark.parametrize("changes", [{}, _KINDS], ids=["plain", "nf4"])
def test_it_resumes_exactly_without_the_adapter(
    first: Callable[..., Path],
    go_on: Callable[..., TrainResult],
    train: Callable[..., TrainResult],
    tmp_path: Path,
    changes: dict,
) -> None:
    checkpoint = first()
    write_peft(read_adapter(checkpoint), tmp_path / "peft")
    full = go_on("whole", tmp_path / "peft", **changes)
    go_on("parts", tmp_path / "peft", stop_iters=2, **changes)
    shutil.rmtree(tmp_path / "peft")
    # Neither the adapter, nor its base, nor what it is like need be given.
    settings = {"lr": 0.02, "train_iters": 4, "seed": 9, "resume_ckpt": "auto"}
    parts = train("parts", **settings)
    assert losses(parts) == losses(full)
    assert content(parts) == content(full)
    again = json.loads((parts.checkpoint / "run_config.json").read_text())["train"]  # type: ignore[operator]
    assert again["adapter"]["value"] == str(tmp_path / "peft")
    assert again["lora_r"] == {"value": 3, "from": str(parts.checkpoint.parent / "2")}  # type: ignore[union-attr]
    # A restart repeats the command.
    with pytest.raises(UserError, match="lora_r: was 3, is 8"):
        train("parts", **{**settings, "train_iters": 5, "lora_r": 8})


def test_a_resumed_run_without_adapters_refuses_their_keys(
    first: Callable[..., Path], train: Callable[..., TrainResult]
) -> None:
    train("out", stop_iters=2)
    with pytest.raises(UserError, match="quantization is given and lora_layer is not"):
        train("out", resume_ckpt="auto", quantization="nf4")
    with pytest.raises(UserError, match=r"adapter .*: .*out/checkpoints/m/2 is of a run that trains all weights"):
        train("out", resume_ckpt="auto", adapter=first())


def test_another_adapter_changes_nothing_on_resume_and_the_run_says_so(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = first()
    go_on("out", checkpoint, stop_iters=2)
    write_peft(read_adapter(checkpoint), tmp_path / "other")
    capsys.readouterr()
    go_on("out", tmp_path / "other", resume_ckpt="auto")
    assert "adapter has no effect: the run resumes from " in capsys.readouterr().err


@pytest.mark.skipif(find_spec("opendelta") is None, reason="opendelta is installed with --no-deps where it is wanted")
def test_both_backends_train_the_same_adapter(first: Callable[..., Path], go_on: Callable[..., TrainResult]) -> None:
    checkpoint = first()
    one, other = go_on("one", checkpoint), go_on("other", checkpoint, lora_backend="opendelta")
    assert content(one) == content(other)


def test_sums_and_pissa_are_trained_as_plain_adapters(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], base: Path, tmp_path: Path
) -> None:
    checkpoint = first(init_lora_weights="pissa")
    other = read_adapter(checkpoint)
    save_adapter(combine([other, other], [0.5, 0.5]), tmp_path / "sum")
    results = [go_on("pissa", checkpoint), go_on("sum", tmp_path / "sum")]
    for result, rank in zip(results, (6, 12)):
        described = json.loads((result.checkpoint / ADAPTER_CONFIG).read_text())  # type: ignore[operator]
        assert (described["r"], described["pissa"]) == (rank, False)
    assert losses(results[0])[0] == pytest.approx(losses(results[1])[0], abs=1e-5)


def test_layers_that_an_adapter_leaves_out_get_none(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], tmp_path: Path
) -> None:
    """As PEFT's layers_to_transform makes one."""
    full = read_adapter(first())
    weights = {name: weight for name, weight in full.weights.items() if ".layers.1." in name or "project_q" in name}
    write_peft(Adapter(full.config, weights, full.path), tmp_path / "peft")
    result = go_on("out", tmp_path / "peft")
    assert read_adapter(result.checkpoint).weights.keys() == weights.keys()  # type: ignore[arg-type]


def test_keys_beside_it_must_say_the_same(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], tmp_path: Path, base: Path
) -> None:
    checkpoint = first()
    assert go_on("same", checkpoint, **{**GIVEN, "lora_layer": "w_out,project_q"}).step == 4
    where = f"in {checkpoint / ADAPTER_CONFIG}"
    for changes, message in (
        ({"lora_r": 8}, f"lora_r is 8 (command line), but 3 {where}"),
        ({"lora_alpha": 7}, f"lora_alpha is 7.0 (command line), but 6.0 {where}"),
        ({"lora_layer": "all"}, f"(command line), but ['project_q', 'w_out'] {where}"),
        ({"use_dora": True}, f"use_dora is True (command line), but False {where}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa' (command line)"),
        ({"modules_to_save": "lm_head"}, f"modules_to_save is ['lm_head'] (command line), but [] {where}"),
        ({"freeze": "*.bias"}, "freeze and adapter are both given"),
        ({"adapter": tmp_path / "nothing"}, f"{tmp_path / 'nothing'}: no such file"),
        ({"adapter": base}, f"adapter {base}: r and alpha are unknown"),
    ):
        with pytest.raises(UserError) as error:
            go_on("no", **{"adapter": checkpoint, **changes})
        assert message in str(error.value)


def test_another_base_or_model_is_refused(
    first: Callable[..., Path],
    go_on: Callable[..., TrainResult],
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    checkpoint = first()
    write_peft(read_adapter(checkpoint), tmp_path / "peft")
    weights = {name: tensor.clone() for name, tensor in read_weights(base).items()}
    weights["lm_head.weight"][3, 3] += 1e-3
    write_weights(tmp_path / "other.pt", weights, weights.items())
    with pytest.raises(UserError, match=r"other\.pt: is not the base that the adapters of"):
        go_on("no", checkpoint, pretrained_model=tmp_path / "other.pt")
    capsys.readouterr()
    assert go_on("taken", tmp_path / "peft", pretrained_model=tmp_path / "other.pt").step == 4
    assert "does not say which base it is for; " in capsys.readouterr().err
    deeper = tmp_path / "deeper.json"
    deeper.write_text(json.dumps(small_model(num_layers=2, hidden_size=64).to_json()))
    with pytest.raises(UserError, match=r"project_q: is for a weight of \[32, 32\], but .*deeper.json has"):
        go_on("no", checkpoint, config=deeper)
    # The base that it names is taken, where it is here.
    assert go_on("named", tmp_path / "peft", pretrained_model="").step == 4
    base.unlink()
    with pytest.raises(UserError, match=r"its base was not found .* as --pretrained_model"):
        go_on("no", tmp_path / "peft", pretrained_model="")


def test_what_we_cannot_represent_is_refused_by_name(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], tmp_path: Path
) -> None:
    write_peft(read_adapter(first()), tmp_path / "peft")
    file = tmp_path / "peft" / ADAPTER_CONFIG
    plain = json.loads(file.read_text())
    for changes in ({"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 4}}, {"use_qalora": True}):
        file.write_text(json.dumps({**plain, **changes}))
        with pytest.raises(UserError, match=next(iter(changes))):
            go_on("no", tmp_path / "peft")


def test_the_configuration_shows_what_the_adapter_says(
    first: Callable[..., Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = first()
    model = str(tmp_path / "model.json")
    run = with_adapter(load_run(model, {"adapter": str(checkpoint)}, complete=False))
    assert (run.train.lora_r, run.train.lora_layer) == (3, ["project_q", "w_out"])
    assert run.train.pretrained_model == str(base)
    assert run.origins["train"]["lora_r"] == str(checkpoint / ADAPTER_CONFIG)
    assert main(["config", "show", "--config", model, "--adapter", str(checkpoint)]) == 0
    assert "['project_q', 'w_out']" in capsys.readouterr().out
    assert main(["plan", "--config", model, "--adapter", str(checkpoint), "--gpus", "1"]) == 0
    capsys.readouterr()


@pytest.mark.slow  # four processes that import torch
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_processes_train_from_an_adapter_what_one_does(
    first: Callable[..., Path],
    go_on: Callable[..., TrainResult],
    base: Path,
    tmp_path: Path,
    tokenizer_path: Path,
    quantization: str,
) -> None:
    checkpoint = first()
    write_peft(read_adapter(checkpoint), tmp_path / "peft")
    words = f"""--config {tmp_path}/model.json --dataset_config {tmp_path}/mixture.json
        --tokenizer_path {tokenizer_path} --output_dir {tmp_path}/two --model_unique m --device cpu
        --batch_size 2 --max_length 64 --global_batch_size 2 --warmup_iters 2 --dataloader_num_workers 0
        --peak_tflops 1 --lr 0.02 --seed 9 --train_iters 4 --report_to none
        --nproc 2 --adapter {tmp_path}/peft --quantization {quantization}"""
    done = subprocess.run(
        [sys.executable, "-m", "fm9g", "train", *words.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit_forward" not in done.stdout + done.stderr
    alone = go_on("alone", checkpoint, quantization=quantization)
    two = read_adapter(tmp_path / "two" / "checkpoints" / "m" / "4").weights
    one = read_adapter(alone.checkpoint).weights  # type: ignore[arg-type]
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-5)


def test_a_hugging_face_folder_is_the_base(
    first: Callable[..., Path], go_on: Callable[..., TrainResult], base: Path, tmp_path: Path
) -> None:
    checkpoint = first()
    export_folder(base, tmp_path / "hf")
    assert losses(go_on("hf", checkpoint, pretrained_model=tmp_path / "hf")) == losses(go_on("pt", checkpoint))
