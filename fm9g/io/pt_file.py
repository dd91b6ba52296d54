"""9G weight files: `torch.save` of a flat dict from weight name to tensor."""

from __future__ import annotations

import mmap
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Protocol

import torch

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.io.inputs import register_input
from fm9g.io.lazy_tensor import LazyStateDict, LazyTensor, TensorMeta, tensor_bytes
from fm9g.io.pt_archive import check_archive, without_values
from fm9g.io.pt_checksums import write_checksums
from fm9g.io.pt_pickle import find_code
from fm9g.out_of_memory import is_out_of_memory


class Tensors(Protocol):
    """Full tensors that arrive one at a time, by name. meta: the shape and type of each, on the meta device."""

    @property
    def meta(self) -> Mapping[str, torch.Tensor]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def read_weights(path: Path) -> LazyStateDict:
    """The tensors of a .pt file as a state dict that reads each one when it is looked up. Raises like `open_pt`."""
    return LazyStateDict(open_pt(path))


def open_pt(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .pt or .bin file, in its order.

    Files from before torch 1.6, compressed ones, and those of machines with the other byte order are read completely.

    Raises UserError for a missing file, a truncated one, and one that contains anything but tensors. Code in a file is
    never executed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty; get or write it again")
    register_input(path)
    archive = check_archive(path)
    if archive is None or not archive.is_plain:
        tensors = _load(path, path, "cpu", is_archive=archive is not None)
        return {
            name: LazyTensor(path, tensor.shape, tensor.dtype, 0, memory=tensor.detach())
            for name, tensor in tensors.items()
        }
    without_data, locations = without_values(path, archive)
    tensors = _load(path, without_data, "meta", is_archive=True)
    return {name: _lazy_tensor(path, name, tensor, locations) for name, tensor in tensors.items()}


def write_weights(path: Path, meta: Mapping[str, TensorMeta], values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes a .pt file from tensors that arrive one at a time. It appears under its name only when complete.

    Args:
        path: the file.
        meta: shape and type of each tensor, in the order of the file.
        values: name and values, on the host, of each tensor, in any order.
    """
    with atomic_file(path) as temporary:
        offsets = preallocate(temporary, meta)
        missing, crcs = set(meta), {}
        with temporary.open("r+b") as file:
            for name, tensor in values:
                missing.remove(name)
                assert (tensor.shape, tensor.dtype) == (meta[name].shape, meta[name].dtype), name
                if tensor.numel():
                    file.seek(offsets[name])
                    file.write(data := tensor_bytes(tensor))
                    crcs[offsets[name]] = zlib.crc32(data)
        assert not missing, missing
        write_checksums(temporary, crcs)


def preallocate(path: Path, meta: Mapping[str, TensorMeta]) -> dict[str, int]:
    """Writes a .pt file of full length without values. `write_checksums` must add the checksums of the values.

    Returns the byte offset of each tensor's values, in the order of the file; empty tensors have none.
    """
    with path.open("wb") as file, torch.serialization.skip_data():  # given a path, torch writes its name into the file
        torch.save(_skeleton(meta), file)
    tensors = _load(path, path, "meta", is_archive=True)
    return {name: offset for name, tensor in tensors.items() if (offset := _file_offset(tensor)) is not None}


def _skeleton(meta: Mapping[str, TensorMeta]) -> dict[str, torch.Tensor]:
    """Tensors that torch.save treats as distinct, on shared memory that is never touched."""
    largest: dict[torch.dtype, int] = {}
    for tensor in meta.values():
        largest[tensor.dtype] = max(largest.get(tensor.dtype, 1), tensor.shape.numel() * tensor.dtype.itemsize)
    buffers = {dtype: mmap.mmap(-1, size) for dtype, size in largest.items()}
    return {
        name: torch.frombuffer(buffers[tensor.dtype], dtype=tensor.dtype, count=tensor.shape.numel()).view(tensor.shape)
        if tensor.shape.numel()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in meta.items()
    }


def _file_offset(tensor: torch.Tensor) -> int | None:
    """The byte offset of the storage of a tensor that was loaded on the meta device; None if it has none."""
    offset: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return offset if tensor.numel() else None


def _has_no_values(tensor: torch.Tensor, device: str) -> bool:
    """Whether a tensor was on the meta device when it was saved. device: the one that it was loaded on."""
    if device == "meta":  # loading a tensor with values notes their offset in the file
        return bool(tensor.numel()) and _file_offset(tensor) is None
    return tensor.is_meta


def _load(path: Path, content: Path | BytesIO, device: str, is_archive: bool) -> dict[str, torch.Tensor]:
    """Has torch load the content of a file, on the meta device without values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever pickle and its own reader raise
        if is_archive and is_out_of_memory(error):
            raise
        raise UserError(f"{path}: {_why_not_loaded(path)}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{path}: expected one flat dict from weight name to tensor, the content of 9G .pt files")
    for name, value in weights.items():
        kind = "a sparse" if value.layout != torch.strided else "a meta" if _has_no_values(value, device) else ""
        if kind:
            raise UserError(f"{path}: {name}: found {kind} tensor, expected one with all its values; save it again")
    return weights


def _why_not_loaded(path: Path) -> str:
    """Why torch cannot load a file. torch's own message advises to execute the code in it."""
    if name := find_code(path):
        return (
            f"refused: it contains code ({name}), which is never run. Save weights with "
            "torch.save(model.state_dict(), FILE) or as safetensors"
        )
    return "not a complete weight file (torch finds no tensors in it); get or write it again"


def _lazy_tensor(path: Path, name: str, tensor: torch.Tensor, locations: Mapping[int, tuple[int, int]]) -> LazyTensor:
    """Locates a tensor that was loaded on the meta device. locations: see fm9g.io.pt_archive.without_values."""
    if tensor.is_quantized or tensor.is_complex():
        raise UserError(f"{path}: {name}: found {tensor.dtype}, expected a plain tensor of real numbers")
    if not tensor.numel():
        return LazyTensor(path, tensor.shape, tensor.dtype, 0)
    loaded_from = _file_offset(tensor)
    assert loaded_from is not None
    start, size = locations[loaded_from]
    if size < tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: not a complete weight file (bytes of {name} are missing); get or write it again")
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    offset = start + int(tensor.storage_offset()) * tensor.element_size()
    return LazyTensor(path, tensor.shape, tensor.dtype, offset, stride)
