"""Adapters in PEFT's layout, there and back, on the exported base."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import small_model
from helpers.random_adapters import logits, make_adapter, make_model
from safetensors.torch import load_file, save_file

from fm9g.convert.adapters import import_peft, read_adapter
from fm9g.convert.hf_export import export_folder
from fm9g.convert.peft import read_peft, write_peft
from fm9g.errors import UserError
from fm9g.io.pt_file import write_weights
from fm9g.lora.adapter_file import open_adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import load_adapter_into

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "granite": {"scale": True, "scale_emb": 12.0, "scale_depth": 1.4, "base_hidden_size": 16},
}


def export(folder: Path, **changes: Any) -> Path:
    model = make_model(**changes)
    write_weights(folder / "m.pt", weights := dict(model.named_parameters()), weights.items())
    (folder / "m.json").write_text(json.dumps(small_model(**changes).to_json()))
    export_folder(folder / "m.pt", folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("how", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_adapter_gives_equal_logits_on_the_exported_base(tmp_path: Path, kind: str, how: dict) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, changes = export(tmp_path, **KINDS[kind]), KINDS[kind]
    adapter = make_adapter(make_model(**changes), **how)
    write_peft(adapter, tmp_path / "peft", base=str(base))
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "peft"
    )
    actual = make_model(**changes)
    load_adapter_into(actual, "", adapter.config, adapter.weights)
    ids = torch.randint(0, 320, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = loaded.eval()(ids).logits[0]
        plain = loaded.get_base_model()
        with loaded.disable_adapter():
            unchanged = plain(ids).logits[0]
    torch.testing.assert_close(logits(actual, ids[0]), reference, atol=1e-5, rtol=1e-5)
    assert (reference - unchanged).abs().max() > 0.01

    again = read_peft(tmp_path / "peft")
    assert all(torch.equal(weight, again.weights[name]) for name, weight in adapter.weights.items())
    assert again.weights.keys() == adapter.weights.keys()
    assert (again.config.scaling, again.config.dora) == (adapter.config.scaling, adapter.config.dora)


def test_an_adapter_that_peft_trained_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = export(tmp_path)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "peft")
    config = import_peft(tmp_path / "peft", tmp_path / "ours", base, overwrite=False)
    assert (config.r, config.scaling, len(config.base_sha256)) == (4, 2.0, 64)
    adapter = open_adapter(tmp_path / "ours")
    actual = make_model()
    load_adapter_into(actual, "", adapter.config, adapter.weights)
    ids = torch.arange(5, 45)
    with torch.no_grad():
        reference = model.eval()(ids[None]).logits[0]
    torch.testing.assert_close(logits(actual, ids), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"]], ids=["output", "both"])
def test_modules_that_peft_saved_are_read(tmp_path: Path, tied: bool, modules: list[str]) -> None:
    """Of a base with one weight for both, if PEFT trained it as one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = export(tmp_path, tie_word_embeddings=tied)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=modules)
    config.ensure_weight_tying = tied and len(modules) > 1
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    model.save_pretrained(tmp_path / "peft")
    if tied and len(modules) == 1:
        with pytest.raises(UserError, match="trained apart"):
            import_peft(tmp_path / "peft", tmp_path / "ours", base, overwrite=False)
        return
    import_peft(tmp_path / "peft", tmp_path / "ours", base, overwrite=False)
    adapter = open_adapter(tmp_path / "ours")
    expected = ["lm_head"] if len(modules) == 1 else ["input_embedding"] if tied else ["input_embedding", "lm_head"]
    assert (adapter.config.modules_to_save, adapter.config.ensure_weight_tying) == (expected, tied)
    actual = make_model(tie_word_embeddings=tied)
    actual.load_state_dict(adapter.saved_modules, strict=False)
    load_adapter_into(actual, "", adapter.config, adapter.weights)
    ids = torch.arange(5, 45)
    with torch.no_grad():
        reference = model.eval()(ids[None]).logits[0]
    torch.testing.assert_close(logits(actual, ids), reference, atol=1e-5, rtol=1e-5)


def test_what_our_adapters_cannot_say_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(make_model())
    write_peft(adapter, tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for changes, message in (
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        (
            {"modules_to_save": ["lm_head"]},
            "json: modules_to_save names lm_head, but its weight is missing",
        ),
        ({"modules_to_save": ["score"]}, "json: modules_to_save: 'score' cannot be trained in full"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "subtracted the adapter's start from the base"),
        ({"use_bdlora": True}, "use_bdlora: this variant of LoRA"),
        ({"r": 5}, "expected rank 5"),
        ({"r": "x"}, "r: found 'x'"),
        ({"r": 4.7}, "r: found 4.7"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
        ({"lora_alpha": 10**400}, "lora_alpha: found"),
        ({"lora_dropout": 5}, "lora_dropout: found 5"),
        ({"use_rslora": "false"}, "use_rslora: found 'false'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: this variant"),
        ({"use_dora": True}, "magnitude is missing"),
        (
            {"target_modules": ["v_proj"]},
            r"config.json: target_modules does not name model.+; it does not belong",
        ),
        ({"target_modules": [*plain["target_modules"], "lm_head", "k_proj"]}, "names k_proj, but the weights hold no"),
        ({"target_modules": []}, "target_modules does not name model.layers.0"),
        ({"exclude_modules": plain["target_modules"][:1]}, "exclude_modules names model.layers.0"),
        ({"layers_to_transform": 1}, "layers_to_transform leaves out model.layers.0"),
        ({"layers_to_transform": [0]}, "layers_to_transform leaves out model.layers.1"),
    ):
        file.write_text(json.dumps({**plain, **changes}))
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path / "p")
    names = sorted({name.rpartition(".")[2] for name in plain["target_modules"]})
    for selection in (
        {"target_modules": [*names, "W_pack"]},
        {"target_modules": ".*proj"},
        {"layers_to_transform": [0, 1]},
    ):
        file.write_text(json.dumps({**plain, **selection}))
        assert set(read_adapter(tmp_path / "p").layers) == set(adapter.layers)
    file.write_text(json.dumps(plain))
    tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, tmp_path / "p" / "x")
    (tmp_path / "p" / "x").rename(tmp_path / "p" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.lora.lora_A has no place in an adapter"):
        read_adapter(tmp_path / "p")
    (tmp_path / "p" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected adapter_model.safetensors"):
        read_adapter(tmp_path / "p")


def test_a_base_that_peft_cannot_put_the_adapter_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fm9g")
    base = export(tmp_path)
    adapter = make_adapter(make_model())
    packed = tmp_path / "packed"  # as InternLM2's and Baichuan's folders are
    packed.mkdir()
    with pytest.raises(UserError, match=r"not a Hugging Face folder \(config.json is missing\)"):
        write_peft(adapter, tmp_path / "no", base=str(packed))
    shutil.copy(base / "config.json", packed)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.W_pack.weight"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, packed / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is missing \(1 of .*lora merge"):
        write_peft(adapter, tmp_path / "no", base=str(packed))
    monkeypatch.chdir(tmp_path)
    for name in ("does/not/exist", "./nothing", "../a/b", "/no/thing", "~/a", "nothing", "hf/nothing"):
        with pytest.raises(UserError, match="no such folder; give a Hugging Face folder, or a name on a hub"):
            write_peft(adapter, tmp_path / "no", base=name)
    with pytest.raises(UserError, match="a file; PEFT loads Hugging Face folders"):
        write_peft(adapter, tmp_path / "no", base=str(base / "config.json"))
    (packed / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="a 9G checkpoint; PEFT loads Hugging Face folders"):
        write_peft(adapter, tmp_path / "no", base=str(packed))
    assert not (tmp_path / "no").exists()
    write_peft(adapter, tmp_path / "yes", base="Qwen/Qwen2.5-7B")
    assert "taken for a name on a hub and not checked" in caplog.text
    assert (
        json.loads((tmp_path / "yes" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "Qwen/Qwen2.5-7B"
    )


def test_a_base_of_other_shapes_or_values_is_refused(tmp_path: Path) -> None:
    base, model = export(tmp_path), make_model()
    weights = dict(model.named_parameters())
    config = {"base": "m.pt", "base_sha256": base_fingerprint(weights, weights.__getitem__)}
    write_peft(make_adapter(model, **config), tmp_path / "same", base=str(base))
    wider = make_adapter(make_model(intermediate_size=64))
    with pytest.raises(UserError, match=r"gate_proj.weight is \[48, 32\], the adapter is for \[64, 32\]"):
        write_peft(wider, tmp_path / "no", base=str(base))
    other = make_adapter(model, **{**config, "base_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"is not the base that the adapter was trained on \(m.pt, SHA-256 0000"):
        write_peft(other, tmp_path / "no", base=str(base))
    assert not (tmp_path / "no").exists()
    # The same values by another name are the same base; what PEFT wrote does not tell.
    base.rename(tmp_path / "renamed")
    write_peft(make_adapter(model, **config), tmp_path / "again", base=str(tmp_path / "renamed"))
    write_peft(dataclasses.replace(other, config=make_adapter(model).config), tmp_path / "peft")
    (tmp_path / "wide").mkdir()
    for of, message in (
        (tmp_path / "gone", "gone: no such file or folder"),
        (export(tmp_path / "wide", intermediate_size=64), r"ffn.* has .* there: the adapter is for another model"),
    ):
        with pytest.raises(UserError, match=message):
            import_peft(tmp_path / "peft", tmp_path / "no", of, overwrite=False)
