"""Opening 9G models for an export."""

import json
from pathlib import Path

import pytest
import torch

from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights


def test_an_unknown_configuration_asks_for_the_reference(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").unlink()
    with pytest.raises(UserError, match="give the folder that it came from with --reference"):
        export_folder(tmp_path / "m.pt", tmp_path / "out")


def test_weight_files_in_the_old_format_are_read_and_integers_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = dict(read_weights(tmp_path / "m.pt"))
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = read_weights(tmp_path / "old.pt")
    assert all(torch.equal(old[name], weights[name]) for name in weights)
    torch.save({name: tensor.to(torch.int8) for name, tensor in weights.items()}, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"found int8, expected fp32, bf16 or fp16: the model is quantized"):
        export_folder(tmp_path / "m.pt", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zipped", "old", "bin"])
def test_models_of_odd_tensors_are_converted(kind: str, pt_file: Path, tmp_path: Path) -> None:
    weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in read_weights(pt_file).items()}
    name = "encoder.layers.0.ffn.ffn.w_out.weight"
    weights[name] = weights[name].detach().t().contiguous().t()
    if kind != "bin":
        torch.save(weights, pt_file, _use_new_zipfile_serialization=kind == "zipped")
        export_folder(pt_file, tmp_path / "out")
        import_folder(tmp_path / "out", tmp_path / "back.pt")
    else:
        export_folder(pt_file, tmp_path / "out", options=ExportOptions(format="bin", shard_bytes=20_000))
        index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert torch.equal(loaded["model.norm.weight"], weights["encoder.output_layernorm.weight"])
        import_folder(tmp_path / "out", tmp_path / "back.pt")
    back = read_weights(tmp_path / "back.pt")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
