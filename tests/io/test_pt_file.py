""".pt files as lazy tensors, and files that contain something else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from helpers.weight_files import some_tensors

from fm9g.errors import UserError
from fm9g.io.pt_file import open_pt, read_weights


@pytest.mark.parametrize("zipped", [True, False])
def test_every_kind_of_tensor_of_a_pt_file_is_read(zipped: bool, tmp_path: Path) -> None:
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    stored = open_pt(tmp_path / "a.pt")
    assert list(stored) == list(tensors)
    for name, tensor in tensors.items():
        found = stored[name].read()
        assert torch.equal(found, tensor.detach())
        assert (found.dtype, found.is_contiguous()) == (tensor.dtype, True)
        if stored[name].is_contiguous:
            byte_range = slice(stored[name].offset, stored[name].offset + stored[name].nbytes)
            values = bytes(tensor.detach().contiguous().flatten().view(torch.uint8))
            assert (tmp_path / "a.pt").read_bytes()[byte_range] == values
        if tensor.dim():
            half = stored[name].rows(1, 2).read() if tensor.shape[0] else None
            assert half is None or torch.equal(half, tensor[1:2].detach())
    assert stored["plain"].is_contiguous == stored["rows"].is_contiguous == zipped
    assert not stored["turned"].is_contiguous


def test_a_pt_file_whose_directory_lies_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(1000)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[:2000] + content[3000:])
    with pytest.raises(UserError, match=r"a.pt: not a complete weight file"):
        open_pt(tmp_path / "a.pt")


def rezipped(file: Path, compression: int, cut: int = 0) -> None:
    """Writes a .pt file anew. cut: bytes that its first tensor loses."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data[: len(data) - cut] if name.endswith("/data/0") else data)


def test_compressed_files_are_read_and_short_records_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    torch.save({"a": tensor}, tmp_path / "a.pt")
    rezipped(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    assert torch.equal(open_pt(tmp_path / "a.pt")["a"].read(), tensor)
    torch.save({"a": tensor}, tmp_path / "b.pt")
    rezipped(tmp_path / "b.pt", zipfile.ZIP_STORED)
    assert torch.equal(open_pt(tmp_path / "b.pt")["a"].read(), tensor)
    rezipped(tmp_path / "b.pt", zipfile.ZIP_STORED, cut=4)
    with pytest.raises(UserError, match=r"b.pt: not a complete weight file"):
        open_pt(tmp_path / "b.pt")


def test_a_file_that_is_no_weights_is_not_to_be_trusted(tmp_path: Path) -> None:
    """torch advises to load such a file with weights_only=False, which runs what it holds."""
    (tmp_path / "a.pt").write_text('{"text": "no weights"}\n')
    with pytest.raises(UserError, match=r"a\.pt: not a complete weight file \(torch finds no tensors in it\)"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_a_tensor_that_has_not_all_its_values_is_no_weight(kind: str, tmp_path: Path) -> None:
    tensor = torch.ones(2, 3)
    incomplete = tensor.to("meta") if kind == "meta" else tensor.to_sparse()
    torch.save({"a": torch.ones(1), "b": incomplete}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt: b: found a {kind} tensor"):
        read_weights(tmp_path / "a.pt")
