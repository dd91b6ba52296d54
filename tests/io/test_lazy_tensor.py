"""Tensors in files, read one at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.weight_files import some_tensors
from safetensors.torch import save_file

from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyTensor, tensor_meta
from fm9g.io.pt_file import open_pt, read_weights
from fm9g.io.safetensors_file import open_safetensors


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    stored = open_safetensors(tmp_path / "a.safetensors")["a"]
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(UserError, match="became shorter while it was read"):
        stored.read()


def test_rows_of_rows() -> None:
    stored = LazyTensor(Path("x"), torch.Size([10, 4]), torch.float16, 100)
    assert stored.rows(2, 8).rows(1, 3) == LazyTensor(Path("x"), torch.Size([2, 4]), torch.float16, 100 + 3 * 8)


def test_a_lazy_state_dict_reads_what_is_looked_up(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save(weights, tmp_path / "a.pt")
    state_dict = read_weights(tmp_path / "a.pt")
    assert {name: tensor.shape for name, tensor in tensor_meta(state_dict).items()} == {"a": (3, 4), "b": (5,)}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state_dict.items())
    with (tmp_path / "a.pt").open("r+b") as file:  # later changes show: nothing was read or mapped in advance
        file.seek(state_dict.meta["b"].offset)
        file.write(bytes(8))
        file.write((7).to_bytes(8, "little"))
    assert state_dict["b"].tolist() == [0, 7, 2, 3, 4]


def test_reading_weights_leaves_no_file_mapped(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(1 << 20)}, tmp_path / "a.pt")
    state_dict = read_weights(tmp_path / "a.pt")
    assert state_dict["a"].shape == (1 << 20,)
    assert str(tmp_path / "a.pt") not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_repeats_its_values_is_not_written_out(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"a.pt: a: repeats its values to fill shape \[1099511627776\]"):
        read_weights(tmp_path / "a.pt")["a"]


def test_flat_chunks_are_the_values_in_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "a.pt")
    for name, lazy in open_pt(tmp_path / "a.pt").items():
        chunks = list(lazy.flat_chunks(4))
        assert all(chunk.dim() == 1 and len(chunk) <= 4 for chunk in chunks)
        values = torch.cat(chunks) if chunks else torch.empty(0)
        assert torch.equal(values, tensors[name].detach().reshape(-1).to(values.dtype))
