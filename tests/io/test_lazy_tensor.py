"""Tensors on disk, read one at a time, and files that grow."""

import errno
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fm9g.errors import UserError
from fm9g.io import append
from fm9g.io.lazy_tensor import LazyTensor, open_pt, open_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {
        "plain": torch.randn(6, 5),
        "parameter": nn.Parameter(torch.randn(3, 3)),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "half": torch.randn(9).bfloat16(),
        "turned": torch.randn(6, 7).t(),
        "repeated": torch.randn(1, 3).expand(4, 3),
    }
    shared = torch.randn(8, 4)
    return {**tensors, "rows": shared[2:5], "columns": shared[:, 1:3], "all": shared}


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
            place = slice(stored[name].offset, stored[name].offset + stored[name].nbytes)
            values = bytes(tensor.detach().contiguous().flatten().view(torch.uint8))
            assert (tmp_path / "a.pt").read_bytes()[place] == values
        if tensor.dim():
            half = stored[name].rows(1, 2).read() if tensor.shape[0] else None
            assert half is None or torch.equal(half, tensor[1:2].detach())
    assert stored["plain"].is_contiguous == stored["rows"].is_contiguous == zipped
    assert not stored["turned"].is_contiguous


def test_safetensors_files_are_read_as_the_library_does(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = open_safetensors(tmp_path / "a.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in tensors.items())


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    stored = open_safetensors(tmp_path / "a.safetensors")["a"]
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(UserError, match="became shorter while it was read"):
        stored.read()


def test_a_pt_file_whose_directory_lies_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(1000)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[:2000] + content[3000:])
    with pytest.raises(UserError, match=r"a.pt: not a whole weight file"):
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
    with pytest.raises(UserError, match=r"b.pt: not a whole weight file"):
        open_pt(tmp_path / "b.pt")


@pytest.mark.parametrize("past_the_cache", [True, False])
def test_a_growing_file_has_every_byte_once(
    past_the_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append, "_BUFFER_BYTES", 3 * 4096)
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(200_000))
    if not past_the_cache:
        opened = os.open

        def refused(path: Path, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags, mode)

        monkeypatch.setattr(os, "open", refused)
    for seed in range(30):
        pick = random.Random(seed)
        expected = bytearray(pick.randbytes(pick.choice((0, 1, 4096, 5000))))
        (tmp_path / "file").write_bytes(expected + b"what is cut off")
        file = append.ResumableAppendWriter(tmp_path / "file", len(expected))
        for _ in range(pick.randint(0, 12)):
            start, length = pick.randrange(100_000), pick.choice((1, 3, 4096, 8192, pick.randrange(40_000)))
            part = source.read_bytes()[start : start + length]
            if pick.random() < 0.4:
                file.copy(source, start, length)
            else:
                file.write(part)
            expected += part
        file.flush()
        assert file.position == len(expected)
        file.fdatasync()
        file.close()
        assert (tmp_path / "file").read_bytes() == expected, seed


def test_rows_of_rows() -> None:
    stored = LazyTensor(Path("x"), torch.Size([10, 4]), torch.float16, 100)
    assert stored.rows(2, 8).rows(1, 3) == LazyTensor(Path("x"), torch.Size([2, 4]), torch.float16, 100 + 3 * 8)
