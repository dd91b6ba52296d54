"""Written Hugging Face folders: types, shards, settings."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.io.pt_file import read_weights


def test_the_dtype_is_kept_or_as_asked_for(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export_folder(tmp_path / "m.pt", tmp_path / "wide", options=ExportOptions(dtype="fp32"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_large_models_are_written_and_read_in_shards(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_folder(tmp_path / "m.pt", tmp_path / "shards", options=ExportOptions(shard_bytes=20_000))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    import_folder(tmp_path / "shards", tmp_path / "back.pt")
    assert read_weights(tmp_path / "back.pt").keys() == read_weights(tmp_path / "m.pt").keys()


def test_generation_settings_travel_along(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 1}')
    export_folder(tmp_path / "m.pt", tmp_path / "out", reference=folder)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7
