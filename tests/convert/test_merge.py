"""Merging adapters into bases, by the command and the guide's tool, and the cases that are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, small_model
from helpers.random_adapters import LAYERS, logits, make_adapter, make_model
from safetensors.torch import load_file

import fm9g.convert.merge as merge_module
from fm9g.checkpoint.manifest import checksum
from fm9g.cli import main
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.convert.hf_export import export_folder
from fm9g.convert.merge import merge
from fm9g.convert.peft import write_peft
from fm9g.convert.source import open_source
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.lora.adapter_file import Adapter, open_adapter, save_adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import B, load_adapter_into


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A .pt file with its configuration, and its Hugging Face folder `ckpt`."""
    weights = dict(make_model(qkv_bias=True).named_parameters())
    write_weights(tmp_path / "7b.pt", weights, weights.items())
    (tmp_path / "7b.json").write_text(json.dumps(small_model(qkv_bias=True).to_json()))
    export_folder(tmp_path / "7b.pt", tmp_path / "ckpt")
    return tmp_path / "7b.pt"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Adapter:
    weights = read_weights(base)
    found = base_fingerprint(weights, weights.__getitem__)
    created = make_adapter(make_model(qkv_bias=True), base=str(base), base_sha256=found)
    save_adapter(created, tmp_path / "adapter")
    return open_adapter(tmp_path / "adapter")


def expected(adapter: Adapter) -> torch.Tensor:
    model = make_model(qkv_bias=True)
    load_adapter_into(model, "", adapter.config, adapter.weights)
    return logits(model)


def loaded(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = make_model(qkv_bias=True)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return logits(model)


def test_a_merged_file_says_what_base_and_adapter_say(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    found = merge(base, adapter, tmp_path / "merged.pt")
    assert found.max_change > 0.05
    assert found.merge_error < 1e-5
    torch.testing.assert_close(loaded(read_weights(tmp_path / "merged.pt")), expected(adapter), atol=2e-5, rtol=1e-5)
    assert json.loads((tmp_path / "merged.json").read_text())["dim_model"] == 32


@pytest.mark.parametrize("of", ["7b.pt", "ckpt"])
@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_the_command_takes_what_there_is(
    base: Path, adapter: Adapter, tmp_path: Path, of: str, kind: str, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    write_peft(adapter, tmp_path / "peft")
    source = tmp_path / "adapter" if kind == "ours" else tmp_path / "peft"
    assert main(["lora", "merge", str(tmp_path / of), str(source), str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert "largest logit" in output.out
    assert ("does not record which base it was trained on" in output.err) == (kind == "peft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(40)
    with torch.no_grad():
        reference = model(ids[None]).logits[0]
    actual = make_model(qkv_bias=True)
    load_adapter_into(actual, "", adapter.config, adapter.weights)
    torch.testing.assert_close(logits(actual, ids), reference, atol=2e-5, rtol=1e-5)


def test_sums_are_computed_in_fp32_whatever_is_stored(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    bf16_weights = {name: weight.bfloat16() for name, weight in read_weights(base).items()}
    write_weights(base, bf16_weights, bf16_weights.items())
    other = dataclasses.replace(adapter.config, base_sha256=base_fingerprint(bf16_weights, bf16_weights.__getitem__))
    adapter = dataclasses.replace(adapter, config=other)
    merge(base, adapter, tmp_path / "same.pt")
    merge(base, adapter, tmp_path / "wide.pt", dtype="fp32")
    same, fp32_weights = read_weights(tmp_path / "same.pt"), read_weights(tmp_path / "wide.pt")
    layer = adapter.layers[0]
    a, b = adapter.weights[f"{layer}.lora.lora_A"], adapter.weights[f"{layer}.lora.lora_B"]
    exact = bf16_weights[f"{layer}.weight"].double() + 2.0 * b.double() @ a.double()
    torch.testing.assert_close(fp32_weights[f"{layer}.weight"].double(), exact, atol=1e-6, rtol=1e-6)
    assert torch.equal(same[f"{layer}.weight"], fp32_weights[f"{layer}.weight"].bfloat16())
    assert same["input_embedding.weight"].dtype == torch.bfloat16


def test_another_base_is_refused(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    weights = {name: weight.clone() for name, weight in read_weights(base).items()}
    weights["lm_head.weight"][0, 0] += 1e-4
    write_weights(base, weights, weights.items())
    with pytest.raises(UserError, match=r"7b.pt: is not the base that .* was trained on"):
        merge(base, adapter, tmp_path / "no.pt")
    wrong = make_adapter(make_model(qkv_bias=True, hidden_size=64))
    with pytest.raises(UserError, match="the adapter is for another model"):
        merge(base, wrong, tmp_path / "no.pt")
    deeper = make_adapter(make_model(num_layers=3))
    with pytest.raises(UserError, match="has no such layer"):
        merge(base, deeper, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_a_merge_that_changes_what_the_model_says_is_an_error(
    base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Adapter, layer: str, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
        part = slice(first, first + len(rows))
        return rows + self.weights[layer + B][part] @ self.weights[layer + ".lora.lora_A"]  # without the scaling

    monkeypatch.setattr(Adapter, "apply", wrong)
    with pytest.raises(UserError, match=r"merged into its weights, logits differ by"):
        merge(base, adapter, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_dropout_of_training_is_not_part_of_a_merge(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    config = dataclasses.replace(adapter.config, dropout=0.5)
    assert merge(base, dataclasses.replace(adapter, config=config), tmp_path / "m.pt").merge_error < 1e-5


def test_what_is_read_is_never_replaced(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    for target in (tmp_path / "adapter", tmp_path / "adapter" / "adapter.pt"):
        with pytest.raises(UserError, match="is an input; choose another"):
            merge(base, adapter, target, overwrite=True)
    save_adapter(adapter, tmp_path / "other")
    folders = [str(tmp_path / "adapter"), str(tmp_path / "other")]
    assert main(["lora", "combine", *folders, "--out", folders[1], "--overwrite"]) == 2
    assert all(open_adapter(Path(folder)).config == adapter.config for folder in folders)


def test_a_target_is_replaced_only_by_what_was_checked(
    base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "ROUNDING_TOLERANCE", -1.0)
    for target in (tmp_path / "keep.pt", tmp_path / "keep"):
        target.write_bytes(b"good") if target.suffix else target.mkdir()
        with pytest.raises(UserError, match="Nothing was written"):
            merge(base, adapter, target, overwrite=True)
        assert target.read_bytes() == b"good" if target.suffix else not list(target.iterdir())


def test_a_merge_of_a_bare_file_takes_the_tokenizer_that_trained(
    base: Path, adapter: Adapter, tmp_path: Path, tokenizer_path: Path
) -> None:
    checkpoint = tmp_path / "4"
    (checkpoint / "tokenizer").mkdir(parents=True)
    for file in tokenizer_path.iterdir():
        shutil.copy(file, checkpoint / "tokenizer")
    write_weights(checkpoint / "fm9g_live_checkpoint-4.pt", adapter.weights, adapter.weights.items())
    for name in (ADAPTER_CONFIG, "fm9g_live_checkpoint-4.log_ckpt", "data_position.json"):
        (checkpoint / name).write_text(json.dumps(adapter.config.to_json() if name == ADAPTER_CONFIG else {}))
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    sums = {str(file.relative_to(checkpoint)): [file.stat().st_size, checksum(file)] for file in files}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 4, "files": sums}))
    merge(base, open_adapter(checkpoint), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    # A damaged file is found although it is named itself.
    weights = checkpoint / "fm9g_live_checkpoint-4.pt"
    content = bytearray(weights.read_bytes())
    content[-300] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="its content has changed"):
        open_adapter(weights)


def test_rows_that_are_written_apart_are_those_that_were_compared(
    base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fm9g.convert import hf_import, resumable_writer

    merge(base, adapter, tmp_path / "one.pt")
    few_rows = functools.partial(resumable_writer.write_resumable, chunk_bytes=300)
    monkeypatch.setattr(hf_import, "write_resumable", few_rows)
    merge(base, adapter, tmp_path / "other.pt")
    one, other = read_weights(tmp_path / "one.pt"), read_weights(tmp_path / "other.pt")
    assert all(torch.allclose(weight, other[name], atol=1e-6) for name, weight in one.items())


def test_a_merge_that_was_started_with_another_adapter_is_not_resumed(base: Path, adapter: Adapter) -> None:
    weights = open_source(base).weights
    other = dataclasses.replace(adapter, weights={name: weight * 2 for name, weight in adapter.weights.items()})
    name = f"{adapter.layers[0]}.weight"
    one, two = (merge_module.merged_weight(name, weights[name], each).transform for each in (adapter, other))
    assert one is not None
    assert two is not None
    assert one.__name__ != two.__name__


def test_the_guides_tool_merges(
    base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The command of its chapter on LoRA, with an adapter of the published toolkit: a bare .pt file."""
    file = tmp_path / "fm9g_live_checkpoint-10.pt"
    write_weights(file, adapter.weights, adapter.weights.items())
    train_config = tmp_path / "7b_lora.json"
    settings = {"lora_layer": LAYERS, "lora_r": 3, "lora_alpha": 6, "pretrained_model": str(base)}
    train_config.write_text(json.dumps({"finetune": settings}))

    def tool(*more: str) -> object:
        words = (
            f"--huggingface-ref-dir {tmp_path}/ckpt --bmtrain-ckpt-path {base} --huggingface-save-dir {tmp_path}/out"
        )
        words += f" --huggingface-save-dir {tmp_path}/out --lora-ckpt-path {file}"
        monkeypatch.syspath_prepend(str(ROOT / "tools"))  # as Python does for a script
        monkeypatch.setattr(sys, "argv", ["bmtrain_2_hgface.py", *words.split(), *more])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "bmtrain_2_hgface.py"), run_name="__main__")
        return end.value.code

    assert tool() == 2
    assert "r and alpha are unknown" in capsys.readouterr().err
    assert tool("--lora-config-path", str(train_config)) == 0
    reference = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    layer = "encoder.layers.1.ffn.ffn.w_out"
    assert torch.allclose(reference, adapter.apply(layer, read_weights(base)[f"{layer}.weight"]))
    # An editable file is not what decides: an adapter that says what it is must agree with it.
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(adapter.config.to_json()))
    train_config.write_text(json.dumps({"finetune": {**settings, "lora_alpha": 32}}))
    assert tool("--lora-config-path", str(train_config), "--overwrite") == 2
    assert "is not what the adapter was trained with" in capsys.readouterr().err


def test_several_adapters_are_combined_and_merged(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    folder, out = str(tmp_path / "adapter"), str(tmp_path / "sum")
    assert main(["lora", "combine", folder, folder, "--weights", "0.75", "-0.5", "--out", out]) == 0
    assert main(["lora", "merge", str(base), out, str(tmp_path / "m.pt")]) == 0
    layer = adapter.layers[0]
    weight = read_weights(base)[f"{layer}.weight"]
    change = read_weights(tmp_path / "m.pt")[f"{layer}.weight"] - weight
    torch.testing.assert_close(change, 0.25 * (adapter.apply(layer, weight) - weight), atol=1e-6, rtol=1e-4)
    for weights in (["1"], ["nan", "1"], ["1", "0"]):
        assert main(["lora", "combine", folder, folder, "--weights", *weights, "--out", str(tmp_path / "no")]) == 2


def test_a_base_with_sliding_windows_is_merged(tmp_path: Path) -> None:
    """The window is shorter than the texts that are compared; the folder is one of Mistral."""
    changes = {"sliding_window": 8}
    weights = dict(make_model(**changes).named_parameters())
    write_weights(tmp_path / "m.pt", weights, weights.items())
    (tmp_path / "m.json").write_text(json.dumps(small_model(**changes).to_json()))
    created = make_adapter(make_model(**changes), base_sha256="")
    save_adapter(created, tmp_path / "adapter")
    found = merge(tmp_path / "m.pt", open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert found.written == "MistralForCausalLM"
    assert found.max_change > 0.05
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["sliding_window"] == 8


def test_the_subcommands_there_and_back(
    base: Path, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["lora", "export", str(tmp_path / "adapter"), str(tmp_path / "p"), "--peft"]) == 0
    assert main(["lora", "import", str(tmp_path / "p"), str(tmp_path / "back"), "--base", str(base)]) == 0
    again = open_adapter(tmp_path / "back")
    assert again.config.base_sha256 == adapter.config.base_sha256
    assert all(torch.equal(weight, again.weights[name]) for name, weight in adapter.weights.items())
    assert main(["lora", "show", str(tmp_path / "back")]) == 0
    assert "6 layers" in capsys.readouterr().out
    assert main(["lora", "import", str(tmp_path / "adapter"), str(tmp_path / "x")]) == 2
    assert "not a PEFT folder" in capsys.readouterr().err


def test_the_card_of_a_merged_model_names_base_and_adapter(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    made_from = f"with a LoRA adapter (rank {adapter.config.r}, alpha {adapter.config.alpha:g}) merged into its weights"
    assert f"It is 7b.pt {made_from}" in card
    assert "9G" not in card
