"""9G weight files: `torch.save` of a flat dict from weight name to tensor."""

from __future__ import annotations

import mmap
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.io.inputs import register_input
from fm9g.io.pt_archive import check_archive
from fm9g.io.pt_checksums import write_checksums
from fm9g.io.pt_pickle import find_code
from fm9g.memory import is_out_of_memory

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TensorMeta(Protocol):
    """What is known of a tensor without its values: of one in memory, on the meta device, or on the disk."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...


def write_weights(path: Path, meta: Mapping[str, torch.Tensor], values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes a .pt file from tensors that come one at a time; it appears under its name only when whole.

    meta: a tensor of the shape and type of each, on the meta device for one. values: every one of them, on the host.
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
    """Writes a .pt file of full length without the values of its tensors, whose checksums write_checksums sets.

    Returns where those of each belong, in the order of the file; tensors without elements have no place.
    """
    with path.open("wb") as file, torch.serialization.skip_data():  # given a path, torch writes its name inside
        torch.save(_skeleton(meta), file)
    return {
        name: offset for name, tensor in load_pt(path, "meta").items() if (offset := file_offset(tensor)) is not None
    }


def file_offset(tensor: torch.Tensor) -> int | None:
    """Where a file that load_pt read on the meta device has the storage of a tensor; None where it has none."""
    offset: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return offset if tensor.numel() else None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host, without a copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _skeleton(meta: Mapping[str, TensorMeta]) -> dict[str, torch.Tensor]:
    """Tensors that torch.save takes for distinct ones, on memory that is never touched."""
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


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pt file, mapped from the disk where the file allows it.

    Raises UserError for a missing file, one that is cut short, and one that holds anything but tensors: nothing in
    it is ever executed.
    """
    return load_pt(path, mmapped=True)


def load_pt(path: Path, device: str = "cpu", mmapped: bool = False) -> dict[str, torch.Tensor]:
    """As read_weights. device: meta: without values. mmapped: map the file where it allows that."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty; get or write it again")
    register_input(path)
    archive = check_archive(path)
    mmapped = mmapped and archive is not None and archive.is_plain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = torch.load(path, map_location=device, weights_only=True, mmap=mmapped)
    except Exception as error:  # torch raises whatever pickle and its own reader raise
        if archive and is_out_of_memory(error):
            raise
        raise UserError(f"{path}: {_why_not_loaded(path)}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{path}: expected one flat dict from weight names to tensors, as 9G .pt files hold")
    for name, value in weights.items():
        if value.layout != torch.strided or (value.is_meta and device != "meta"):
            kind = "a meta" if value.is_meta else "a sparse"
            raise UserError(f"{path}: {name}: found {kind} tensor, expected one with all its values; save it again")
    return weights


def _why_not_loaded(path: Path) -> str:
    """In our words: torch's own advise to run what is in the file."""
    if name := find_code(path):
        return (
            f"refused: it contains code ({name}), which is never run. Weights are saved with "
            "torch.save(model.state_dict(), FILE) or as safetensors"
        )
    return "not a whole weight file (torch finds no tensors in it); get or write it again"


def check_dtypes(weights: Mapping[str, TensorMeta], where: str) -> None:
    """Raises UserError for quantized weights, and for what is no weight."""
    for name, weight in weights.items():
        if weight.dtype not in _FLOATS:
            found = f"{where}: {name}: found {str(weight.dtype).removeprefix('torch.')}, expected fp32, bf16 or fp16"
            if weight.dtype in (torch.bool, torch.int64):
                raise UserError(f"{found}: it is no weight; remove it, or get the file again")
            raise UserError(f"{found}: the model is quantized; take the one that it was made from")


def check_weights(
    weights: Mapping[str, TensorMeta], shapes: Mapping[str, torch.Size], where: str, strict: bool
) -> list[str]:
    """Compares the weights of a file with those of a model.

    strict: missing and unknown names are errors; else they come back as lines to show. A wrong shape always is one.
    """
    if not weights.keys() & shapes.keys():
        if any(name.endswith(".lora.lora_A") for name in weights):
            raise UserError(f"{where}: holds an adapter, not a model: `fm9g lora merge` puts it into its base")
        known = f"it has {min(weights)}, the model {min(shapes)}" if weights else "it is empty"
        raise UserError(f"{where}: holds no weight of the model ({known}); of a Hugging Face model, give the folder")
    differences = []
    for problem, names in (
        ("is missing", shapes.keys() - weights.keys()),
        ("is not part of the model", weights.keys() - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"{where}: {min(names)}{more} {problem}")
    check_dtypes({name: weights[name] for name in shapes if name in weights}, where)
    wrong = [name for name in shapes.keys() & weights.keys() if weights[name].shape != shapes[name]]
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{where}: {name}: shape {list(weights[name].shape)}, expected {list(shapes[name])}; "
            f"{len(wrong)} such: it was made with another model configuration"
        )
    if differences and strict:
        raise UserError(*differences)
    return differences
