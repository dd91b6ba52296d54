"""Runs that train adapters: what their checkpoints hold, that they go on exactly, and that the base stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.common import small_model

from fm9g.cli import main
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.train_rules import LINEAR_LAYERS
from fm9g.convert.hf_export import export_folder
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.lora.adapter_file import open_adapter
from fm9g.lora.inject import linear_layers
from fm9g.model.transformer import FM9G
from fm9g.run_files import read_metrics
from fm9g.train.runner import TrainResult

LAYERS = ["project_q", "project_v", "w_0", "w_out"]
KINDS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.2},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loraplus": {"loraplus_lr_ratio": 16},
    "nf4": {"quantization": "nf4"},
    "nf4-single": {"quantization": "nf4", "double_quant": False},
    "ema": {"ema_decay": 0.9},
    "muon": {"optimizer": "muon"},
    "modules": {"modules_to_save": "embed_tokens,lm_head", "init_lora_weights": "pissa", "ema_decay": 0.9},
    "pissa-nf4": {"init_lora_weights": "pissa_niter_16", "quantization": "nf4", "ema_decay": 0.9},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = FM9G(small_model(dropout=0.1, scale=True, base_hidden_size=16))
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=5)
    write_weights(tmp_path / "base.pt", weights := dict(model.named_parameters()), weights.items())
    return tmp_path / "base.pt"


@pytest.fixture
def tune(train: Callable[..., TrainResult], base: Path) -> Callable[..., TrainResult]:
    """tune(out, key=value, ...): a run of adapters on `base`."""

    def run(out: str, **changes: object) -> TrainResult:
        settings = {
            "pretrained_model": base,
            "lora_layer": json.dumps(LAYERS),
            "lora_r": 4,
            "lora_alpha": 8,
            "lr": 0.02,
        }
        return train(out, **{**settings, **changes})

    return run


def losses(result: TrainResult) -> list[float]:
    return [line["Loss/train"] for line in read_metrics(result.metrics_file) if "Loss/train" in line]


def weight_file(result: TrainResult) -> Path:
    assert result.checkpoint is not None
    return next(result.checkpoint.glob("*.pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_resume_exactly(tune: Callable[..., TrainResult], tmp_path: Path, kind: str) -> None:
    full = tune("whole", **KINDS[kind])
    assert losses(full)[-1] < losses(full)[0]
    tune("parts", **KINDS[kind], stop_iters=5)
    # The base is found where it was: the guide's resume block empties pretrained_model.
    parts = tune("parts", **KINDS[kind], resume_ckpt="auto", pretrained_model="")
    assert losses(parts) == losses(full)
    assert weight_file(parts).read_bytes() == weight_file(full).read_bytes()
    for suffix in (".rank-0.opt", ".ema.pt"):
        files = [next(r.checkpoint.glob(f"*{suffix}"), None) for r in (full, parts)]  # type: ignore[union-attr]
        assert (files[0] is None) == (suffix == ".ema.pt" and "ema_decay" not in KINDS[kind])
        if files[0] and files[1]:
            one, other = read_weights(files[0]), read_weights(files[1])
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_every_kind_is_a_training_of_its_own(tune: Callable[..., TrainResult]) -> None:
    found = {kind: losses(tune(kind, train_iters=4, **changes)) for kind, changes in KINDS.items() if kind != "ema"}
    assert len({tuple(values) for values in found.values()}) == len(found)


def test_a_checkpoint_is_the_adapter_and_says_what_it_is(tune: Callable[..., TrainResult], base: Path) -> None:
    before = base.read_bytes()
    result = tune("out")
    weights = read_weights(weight_file(result))
    assert len(weights) == 2 * 2 * len(LAYERS)
    layer = "encoder.layers.1.ffn.ffn.w_out.lora"
    assert weights[f"{layer}.lora_A"].shape == (4, 48)
    assert weights[f"{layer}.lora_B"].shape == (32, 4)
    described = json.loads((result.checkpoint / ADAPTER_CONFIG).read_text())  # type: ignore[operator]
    assert described["r"] == 4
    assert described["lora_alpha"] == 8
    assert described["target_modules"] == LAYERS
    assert len(described["base_sha256"]) == 64
    assert base.read_bytes() == before


@pytest.mark.parametrize("given", ["lm_head", "model.embed_tokens, output"])
def test_modules_to_save_are_trained_in_full_and_the_rest_stays(
    tune: Callable[..., TrainResult], base: Path, given: str
) -> None:
    result = tune("out", modules_to_save=given, quantization="nf4")
    modules = ["lm_head"] if given == "lm_head" else ["input_embedding", "lm_head"]
    weights, before = read_weights(weight_file(result)), read_weights(base)
    complete = {name for name in weights if ".lora." not in name}
    assert complete == {f"{module}.weight" for module in modules}
    for name in complete:
        assert (weights[name] - before[name]).abs().max() > 1e-3
    moments = read_weights(next(result.checkpoint.glob("*.opt")))  # type: ignore[union-attr]
    assert all(moments[f"{name}.exp_avg"].shape == weights[name].shape for name in complete)
    described = json.loads((result.checkpoint / ADAPTER_CONFIG).read_text())  # type: ignore[operator]
    assert described["modules_to_save"] == modules
    with pytest.raises(UserError, match=r"modules_to_save: was .*lm_head.*, is "):
        tune("out", modules_to_save="wte", resume_ckpt="auto", train_iters=20)


def test_weight_decay_reaches_modules_to_save(tune: Callable[..., TrainResult]) -> None:
    found = []
    for decay in (0.0, 5.0):
        weights = read_weights(weight_file(tune(f"d{decay}", modules_to_save="lm_head", weight_decay=decay)))
        found.append(float(weights["lm_head.weight"].norm()))
    assert found[1] < 0.9 * found[0]


def test_an_adapter_is_not_taken_for_a_model(
    tune: Callable[..., TrainResult], train: Callable[..., TrainResult]
) -> None:
    checkpoint = tune("out", train_iters=1).checkpoint
    assert checkpoint is not None
    with pytest.raises(UserError, match=r"an adapter.* expected .* `fm9g lora merge BASE "):
        train("full", pretrained_model=checkpoint)
    with pytest.raises(UserError, match=r"is an adapter, not a model"):
        export_folder(checkpoint, checkpoint.parent / "hf")


@pytest.mark.skipif(find_spec("opendelta") is None, reason="opendelta is installed with --no-deps where it is wanted")
def test_both_backends_give_the_same_adapter(tune: Callable[..., TrainResult]) -> None:
    one = tune("one", lora_dropout=0.1)
    other = tune("other", lora_dropout=0.1, lora_backend="opendelta")
    assert losses(one) == losses(other)
    assert weight_file(one).read_bytes() == weight_file(other).read_bytes()
    # Either goes on from the other.
    tune("mixed", lora_dropout=0.1, stop_iters=5)
    mixed = tune("mixed", lora_dropout=0.1, resume_ckpt="auto", lora_backend="opendelta")
    assert weight_file(mixed).read_bytes() == weight_file(one).read_bytes()


def test_another_base_or_another_adapter_is_refused_on_resume(
    tune: Callable[..., TrainResult], base: Path, tmp_path: Path
) -> None:
    tune("out", stop_iters=3)
    weights = {name: tensor.clone() for name, tensor in read_weights(base).items()}
    weights["encoder.layers.1.ffn.ffn.w_out.weight"][3, 3] += 1e-3
    write_weights(tmp_path / "other.pt", weights, weights.items())
    with pytest.raises(UserError, match="is not the base that the adapters of"):
        tune("out", resume_ckpt="auto", pretrained_model=tmp_path / "other.pt")
    with pytest.raises(UserError, match="lora_r: was 4, is 8"):
        tune("out", resume_ckpt="auto", lora_r=8)
    base.unlink()
    with pytest.raises(UserError, match="no longer exists; give --pretrained_model"):
        tune("out", resume_ckpt="auto", pretrained_model="")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_layer": '["lm_head"]'}, "'lm_head' is not the name of a linear layer; these are: project_q"),
        ({"modules_to_save": "project_q"}, "modules_to_save: 'project_q' cannot be trained in full beside adapters"),
        ({"lora_layer": "[]", "lora_r": 8, "lora_alpha": 16, "modules_to_save": "lm_head"}, "lora_layer is not"),
        ({"lora_layer": "[]"}, "lora_r is given and lora_layer is not"),
        ({"lora_layer": "__import__('os')"}, "not the name of a linear layer"),
        ({"lora_layer": "layers.9.ffn.ffn.w_out"}, "not the name of a linear layer"),
        ({"pretrained_model": ""}, "needs a pretrained_model"),
        ({"pretrained_model": "", "resume_ckpt": "auto"}, "needs a pretrained_model"),
        ({"strict_state_dict": False}, "adapters need a complete base model"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio: found 0"),
        ({"lora_layer": '["project_q"'}, "lora_layer: found"),
        ({"lora_layer": "[1]"}, "lora_layer"),
        ({"lora_r": "1e30"}, "lora_r: found"),
        ({"lora_r": 40, "init_lora_weights": "pissa"}, "has 32 singular vectors"),
        ({"quantization": "nf3"}, "did you mean 'nf4'"),
        ({"optimizer": "adafactor"}, "B starts at zero, so it would never move; use adamw8bit"),
        ({"freeze": "*.bias"}, "freeze and lora_layer are both given"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "keep one of them"),
        ({"lora_backend": "opendelta", "quantization": "nf4"}, "use peft"),
    ],
)
def test_what_cannot_be_meant_is_refused(tune: Callable[..., TrainResult], changes: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        tune("no", **changes)


def test_names_of_layers_are_checked_where_the_configuration_is_read(capsys: pytest.CaptureFixture) -> None:
    for name in ("lm_head", "every"):
        words = ["--pretrained_model", "m.pt", "--lora_layer", f"project_q,{name}"]
        assert main(["config", "show", "--config", "tiny", *words]) == 2
        error = capsys.readouterr().err
        assert f"lora_layer: {name!r} is not the name of a linear layer; these are: project_q, project_k," in error
        assert "all for every one" in error


@pytest.mark.parametrize("name", ["all", "all-linear"])
def test_all_is_every_linear_layer_but_the_output(tune: Callable[..., TrainResult], name: str) -> None:
    result = tune("out", train_iters=1, lora_layer=name)
    every = set(linear_layers(FM9G(small_model()).encoder.layers))
    assert {key.rpartition(".lora.")[0] for key in read_weights(weight_file(result))} == every
    described = json.loads((result.checkpoint / ADAPTER_CONFIG).read_text())  # type: ignore[operator]
    assert described["target_modules"] == list(LINEAR_LAYERS)


def test_the_ratio_of_lora_plus_is_on_b(tune: Callable[..., TrainResult]) -> None:
    for ratio, small in ((1e-6, True), (1.0, False)):
        weights = read_weights(weight_file(tune(f"r{ratio}", train_iters=4, loraplus_lr_ratio=ratio)))
        largest = max(float(weight.abs().max()) for name, weight in weights.items() if name.endswith("lora_B"))
        assert (0 < largest < 1e-6) if small else largest > 1e-3


def test_a_row_without_a_direction_cannot_be_turned(tune: Callable[..., TrainResult], base: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in read_weights(base).items()}
    weights["encoder.layers.1.self_att.self_attention.project_q.weight"][3] = 0
    write_weights(base, weights, weights.items())
    with pytest.raises(UserError, match=r"use_dora: .*1.self_att.self_attention.project_q.weight has a row of zeros"):
        tune("no", use_dora=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantized_base_trains_as_the_whole_base_of_its_values(
    tune: Callable[..., TrainResult], base: Path, tmp_path: Path, kind: str
) -> None:
    """How far training gets on rounded values is chance; that it is the training on these values is not."""
    weights = read_weights(base)
    in_layers = {name for name, weight in weights.items() if name.startswith("encoder.layers.") and weight.ndim == 2}
    rounded = {name: _rounded(weight, kind) if name in in_layers else weight for name, weight in weights.items()}
    write_weights(tmp_path / "rounded.pt", rounded, rounded.items())
    found = losses(tune("quantized", quantization=kind))
    assert found == pytest.approx(losses(tune("rounded", pretrained_model=tmp_path / "rounded.pt")), abs=1e-4)
    assert found != losses(tune("whole"))


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """There and back by bitsandbytes alone."""
    from bitsandbytes import functional

    if kind == "int8":
        bits, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(bits, scales).float()
    bits, state = functional.quantize_4bit(weight.clone(), blocksize=64, compress_statistics=True, quant_type=kind)
    return functional.dequantize_4bit(bits, state)


@pytest.mark.slow  # several seeds
def test_a_quantized_base_trains_about_as_far_as_the_whole_one(tune: Callable[..., TrainResult]) -> None:
    """The mean of the last ten losses: over seeds, 4 bits move it by about 2 % of what is gained, at most 4 %."""

    def gain(out: str, **changes: object) -> float:
        found = losses(tune(out, train_iters=30, **changes))
        return found[0] - sum(found[-10:]) / 10

    plain = gain("plain")
    assert plain > 0.3
    for kind in ("nf4", "fp4", "int8"):
        assert gain(kind, quantization=kind) == pytest.approx(plain, rel=0.25), kind


def test_pissa_starts_as_the_base_and_its_file_is_a_plain_adapter(tune: Callable[..., TrainResult], base: Path) -> None:
    plain, pissa = tune("plain", train_iters=2), tune("pissa", train_iters=2, lr=1e-3, init_lora_weights="pissa")
    assert losses(plain)[0] == pytest.approx(losses(pissa)[0], abs=1e-5)
    adapter = open_adapter(pissa.checkpoint)  # type: ignore[arg-type]
    assert (adapter.config.r, adapter.config.scaling) == (8, 2.0)
    with torch.no_grad():
        layer = "encoder.layers.0.ffn.ffn.w_in.w_0"
        weight = read_weights(base)[f"{layer}.weight"]
        change = (adapter.apply(layer, weight) - weight).norm() / weight.norm()
    assert 0 < change < 0.05  # one step's, not the singular vectors'
