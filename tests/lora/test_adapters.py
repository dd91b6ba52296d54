"""Adapters by themselves: their files, what they do to a weight, sums of them, and weights in few bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, small_model
from helpers.random_adapters import LAYERS, logits, make_adapter, make_model
from torch import nn

from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig
from fm9g.errors import UserError
from fm9g.io.weights import write_weights
from fm9g.lora.adapter_file import Adapter, combine, open_adapter, save_adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import MAGNITUDE, A, B, canonical_name, inject_adapters, load_adapter_into
from fm9g.lora.quantize import QuantizedLinear
from fm9g.model.transformer import FM9G


def merged(model: FM9G, *adapters: Adapter) -> FM9G:
    for adapter in adapters:
        for layer in adapter.layers:
            linear = model.get_submodule(layer)
            linear.weight.data = adapter.apply(layer, linear.weight.data)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}, {"scale": True}])
def test_a_merged_weight_does_what_pefts_layers_do(changes: dict) -> None:
    scaled = {"scale": True, "base_hidden_size": 16} if changes.pop("scale", False) else {}
    adapter = make_adapter(make_model(**scaled), **changes)
    beside = make_model(**scaled)
    before = logits(beside)
    load_adapter_into(beside, "", adapter.config, adapter.weights)
    after = logits(merged(make_model(**scaled), adapter))
    assert (logits(beside) - before).abs().max() > 0.05
    torch.testing.assert_close(logits(beside), after, atol=2e-5, rtol=1e-5)


def test_combined_adapters_are_their_weighted_sum() -> None:
    one = make_adapter(make_model(), 1)
    other = make_adapter(make_model(), 2, r=2, alpha=5.0, layers=["project_q", "w_1"], rslora=True)
    both = combine([one, other], [0.7, -0.4])
    assert both.config.r == 5
    for layer in both.layers:
        zero = torch.zeros_like(make_model().get_submodule(layer).weight)
        parts = [
            share * adapter.apply(layer, zero)
            for adapter, share in ((one, 0.7), (other, -0.4))
            if layer in adapter.layers
        ]
        torch.testing.assert_close(both.apply(layer, zero), sum(parts))


def test_adapters_of_several_bases_or_of_dora_are_not_added_up() -> None:
    one, other = make_adapter(make_model(), base_sha256="1"), make_adapter(make_model(), base_sha256="2")
    with pytest.raises(UserError, match="trained on different bases"):
        combine([one, other], [1.0, 1.0])
    with pytest.raises(UserError, match="DoRA adapters cannot be added up"):
        combine([one, make_adapter(make_model(), dora=True)], [1.0, 1.0])
    with pytest.raises(UserError, match="they are of different models"):
        combine([make_adapter(make_model()), make_adapter(make_model(hidden_size=64))], [1.0, 1.0])


def test_an_adapter_comes_back_from_its_folder(tmp_path: Path) -> None:
    adapter = make_adapter(make_model(), dora=True, base="b.pt", base_sha256="0" * 64)
    save_adapter(adapter, tmp_path / "a")
    again = open_adapter(tmp_path / "a")
    assert again.config == adapter.config
    assert all(torch.equal(weight, again.weights[name]) for name, weight in adapter.weights.items())
    assert again.weights.keys() == adapter.weights.keys()


def write(adapter: Adapter, path: Path, config: dict | None = None) -> Path:
    write_weights(path, adapter.weights, adapter.weights.items())
    if config is not None:
        (path.parent / ADAPTER_CONFIG).write_text(json.dumps(config))
    return path


def test_every_key_is_used_or_refused(tmp_path: Path) -> None:
    adapter = make_adapter(make_model())
    described, layer = adapter.config.to_json(), adapter.layers[0]

    def refused(message: str, weights: dict, config: dict = described) -> None:
        with pytest.raises(UserError, match=message):
            open_adapter(write(Adapter(adapter.config, weights, tmp_path), tmp_path / "a.pt", config))

    plain = dict(adapter.weights)
    refused(r"layer.extra has no place in an adapter", {**plain, "layer.extra": torch.ones(1)})
    refused("looks like a whole model's", {"input_embedding.weight": torch.ones(2, 2)})
    refused("is empty", {})
    refused(r"lora_B is missing", {name: weight for name, weight in plain.items() if name != layer + B})
    refused("expected rank 3", {**plain, layer + A: torch.ones(4, 32)})
    refused("expected rank 8", plain, {**described, "r": 8})
    refused("holds no adapter for w_1", plain, {**described, "target_modules": [*LAYERS, "w_1"]})
    refused("says nothing of DoRA", {**plain, layer + MAGNITUDE: torch.ones(32)})
    refused("magnitude is missing", plain, {**described, "use_dora": True})
    refused("found int32, expected fp32, bf16 or fp16", {**plain, layer + A: plain[layer + A].int()})
    refused("found float8_e5m2, expected", {**plain, layer + A: plain[layer + A].to(torch.float8_e5m2)})
    refused("holds values that are not finite", {**plain, layer + A: plain[layer + A] * float("nan")})
    refused("lora_alpha: found 1e\\+300", plain, {**described, "lora_alpha": 1e300})
    refused("lora_alpha", plain, {**described, "lora_alpha": "x"})
    refused("unknown key", plain, {**described, "lora_beta": 1})
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(described))
    torch.save({**plain, layer + A: torch.zeros(1).expand(3, 32)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="repeats its values"):
        open_adapter(tmp_path / "a.pt")
    torch.save({**plain, 3: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="expected one flat dict"):
        open_adapter(tmp_path / "a.pt")


def test_r_and_alpha_come_from_the_adapter(tmp_path: Path) -> None:
    """Of an adapter of the published toolkit, from its train configuration; where both are there, they must agree."""
    adapter = make_adapter(make_model())
    file = write(adapter, tmp_path / "fm9g_live_checkpoint-10.pt")
    with pytest.raises(UserError, match=r"r and alpha are not known, .*adapter_config.json is missing"):
        open_adapter(file)
    settings = {"lora_layer": LAYERS, "lora_r": 3, "lora_alpha": 6}
    train_config = tmp_path / "7b_lora.json"
    train_config.write_text(json.dumps({"finetune": settings}))
    assert open_adapter(file, train_config).config.scaling == 2.0
    train_config.write_text(json.dumps({"finetune": {**settings, "lora_r": 4}}))
    with pytest.raises(UserError, match="expected rank 4"):
        open_adapter(file, train_config)
    write(adapter, file, adapter.config.to_json())
    train_config.write_text(json.dumps({"finetune": {**settings, "lora_alpha": 32}}))
    with pytest.raises(UserError, match=r"7b_lora.json: is not what the adapter was trained with .*lora_alpha is 32"):
        open_adapter(file, train_config)
    train_config.write_text(json.dumps({"pretrain": {"lr": 1}}))
    with pytest.raises(UserError, match="has no lora_layer"):
        open_adapter(file, train_config)


def test_the_hash_of_a_base_is_of_its_values() -> None:
    weights = {name: weight.bfloat16() for name, weight in make_model().named_parameters()}
    found = base_fingerprint(weights, weights.__getitem__)
    assert found == base_fingerprint(reversed(list(weights)), lambda name: weights[name].float())
    changed = {**weights, "encoder.output_layernorm.weight": weights["encoder.output_layernorm.weight"] * 1.01}
    assert found != base_fingerprint(changed, changed.__getitem__)
    renamed = {name.replace("project_k", "project_x"): weight for name, weight in weights.items()}
    assert found != base_fingerprint(renamed, renamed.__getitem__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bits", "error"), [("nf4", 4.2, 0.12), ("fp4", 4.2, 0.16), ("int8", 8.1, 0.01)])
def test_a_quantized_layer_is_near_its_weight_and_small(
    dtype: torch.dtype, kind: str, bits: float, error: float
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 256)
    layer = QuantizedLinear(plain, kind, double_quant=True)
    layer.set_weight(plain.weight.detach(), dtype)
    assert layer.nbytes * 8 / plain.weight.numel() < bits
    x = torch.randn(7, 512, dtype=dtype, requires_grad=True)
    bias = plain.bias.to(dtype)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    out = layer(x)
    assert out.dtype == dtype
    expected = nn.functional.linear(x.float(), plain.weight, plain.bias)
    assert (out.float() - expected).norm() / (expected - plain.bias).norm() < error
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight)
    before = layer.weight
    with torch.no_grad():  # an evaluation changes nothing for good
        layer.eval()(x)
    assert torch.equal(before, layer.weight)


def test_scales_are_quantized_too_where_that_is_asked_for() -> None:
    plain = nn.Linear(512, 256, bias=False)
    sizes = []
    for double in (True, False):
        layer = QuantizedLinear(plain, "nf4", double)
        layer.set_weight(plain.weight.detach(), torch.float32)
        sizes.append(layer.nbytes)
    assert sizes[0] < 0.95 * sizes[1]


def test_nothing_else_is_trained_and_names_are_those_of_files() -> None:
    with torch.device("meta"):
        model = FM9G(small_model(qkv_bias=True))
    before = [name for name, _ in model.named_parameters()]
    chosen = inject_adapters(
        model, model.encoder.layers, AdapterConfig(r=2, alpha=2.0, layers=["self_attention.project_q"])
    )
    assert len(chosen) == 2
    trained = {canonical_name(name) for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {layer + part for layer in chosen for part in (A, B)}
    assert {canonical_name(name) for name, _ in model.named_parameters()} == trained | set(before)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.slow
def test_bitsandbytes_is_imported_where_something_is_quantized_and_nowhere_else() -> None:
    """That takes seconds. In a process of its own, where nothing has imported it."""
    program = """
import sys, torch
from fm9g.config.adapter import AdapterConfig
from fm9g.lora.inject import inject_adapters
from fm9g.lora.quantize import quantize_layers
from fm9g.lora.init import AdapterInit

def adapt(quantize):
    model = torch.nn.Module()
    model.encoder = torch.nn.Module()
    model.encoder.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"x": torch.nn.Linear(4, 4)})])
    if quantize:
        quantize_layers(model.encoder.layers, "nf4", True)
    config = AdapterConfig(r=2, alpha=2.0, layers=["x"], pissa=True)
    chosen = inject_adapters(model, model.encoder.layers, config)
    AdapterInit(config, chosen, lambda _: torch.eye(4), "pissa", 1)._initial_ab(chosen[0])

adapt(quantize=False)
assert not any(name.startswith("bitsandbytes") for name in sys.modules), "imported"
from peft.import_utils import is_bnb_available
assert is_bnb_available(), "kept from others"
adapt(quantize=True)
assert "bitsandbytes" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bitsandbytes_does_not_warn_of_a_kernel_that_nothing_here_uses(tmp_path: Path) -> None:
    """It does so on CPUs with AVX512-BF16, so a package of the same name stands in for it here."""
    folder = tmp_path / "bitsandbytes" / "backends" / "cpu"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder.parent.parent / "__init__.py").write_text("import bitsandbytes.backends.cpu.ops")
    warn = "import logging\nlogging.getLogger(__name__).warning('Failed to load CPU gemm_4bit_forward')"
    (folder / "ops.py").write_text(warn)
    program = "from fm9g.import_utils import import_bitsandbytes; print(import_bitsandbytes('quantization').__name__)"
    for code, warns in (("import bitsandbytes", True), (program, False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("gemm_4bit_forward" in done.stderr) == warns
    assert done.stdout == "bitsandbytes\n"
    (folder.parent.parent / "__init__.py").write_text("raise RuntimeError('no CUDA')")
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=False, cwd=ROOT)  # fmt: skip
    assert "quantization: bitsandbytes cannot be used here (no CUDA); install it" in done.stderr
