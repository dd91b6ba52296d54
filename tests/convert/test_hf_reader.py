"""Weights of Hugging Face folders: old, damaged, of other types."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fm9g.convert.hf_export import export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights


def test_old_bin_folders_are_read(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    import_folder(folder, tmp_path / "back.pt")
    before = read_weights(tmp_path / "m.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in read_weights(tmp_path / "back.pt").items())


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int32, torch.int64, torch.bool]
)
def test_weights_of_other_types_say_what_to_do(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """Scales, zero points and packed bits lie beside quantized weights; the message is about the weights."""
    weights = load_file(folder / "model.safetensors")
    name = min(name for name in weights if name.endswith("q_proj.weight"))
    found = rf"{name}: found {str(dtype).removeprefix('torch.')}, expected fp32, bf16 or fp16: "
    found += "it is not a weight" if dtype in (torch.int64, torch.bool) else "the model is quantized; use the"
    more = {name: weights[name].to(dtype), f"{name}_scale_inv": torch.ones(1), "a.scales": torch.ones(1)}
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=found):
        import_folder(folder, tmp_path / "no.pt")
    actual = dict(read_weights(tmp_path / "m.pt"))
    name = min(actual)
    torch.save(actual | {name: actual[name].to(dtype)}, tmp_path / "q.pt")
    shutil.copy(tmp_path / "m.json", tmp_path / "q.json")
    with pytest.raises(UserError, match=found.replace(found.partition(":")[0], name)):
        export_folder(tmp_path / "q.pt", tmp_path / "out")


def damage(name: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shards = sorted(folder.glob("*.safetensors"))
    if name == "missing shard":
        shards[1].unlink()
    elif name == "cut shard":
        os.truncate(shards[1], shards[1].stat().st_size - 1)
    elif name == "index is no JSON":
        index.write_text("{oops")
    elif name == "index is empty":
        index.write_text("{}")
    elif name == "index leads away":
        listed["weight_map"]["model.norm.weight"] = "../m.safetensors"
        index.write_text(json.dumps(listed))
    elif name == "index of another":
        listed["weight_map"]["model.other.weight"] = shards[0].name
        index.write_text(json.dumps(listed))
    elif name == "twice":
        one, two = load_file(shards[0]), load_file(shards[1])
        save_file({**two, next(iter(one)): next(iter(one.values()))}, shards[1])
    elif name == "integers":
        save_file({key: tensor.to(torch.int8) for key, tensor in load_file(shards[1]).items()}, shards[1])
    elif name == "config":
        (folder / "config.json").write_text("[")
    else:
        assert name == "no weights"
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing shard", r"model-00002-of-0000\d.safetensors: is missing, but .*index.json lists it"),
        ("cut shard", "not a complete safetensors file"),
        ("index is no JSON", r"index.json, line 1, column 2: not JSON"),
        ("index is empty", "weight_map: expected an object"),
        ("index leads away", "expected the name of a file beside it"),
        ("index of another", r"model.other.weight: is missing, but .*index.json lists it"),
        ("twice", r"is in model-00001-of-0000\d.safetensors too"),
        ("integers", r"found int8, expected fp32, bf16 or fp16: the model is quantized"),
        ("config", "not JSON"),
        ("no weights", r"has no weights; expected model\*.safetensors or"),
    ],
)
def test_damaged_folders_get_one_message(name: str, expected: str, sharded_folder: Path, tmp_path: Path) -> None:
    damage(name, sharded_folder)
    with pytest.raises(UserError, match=expected):
        import_folder(sharded_folder, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()
    assert not list(tmp_path.glob(".*"))
