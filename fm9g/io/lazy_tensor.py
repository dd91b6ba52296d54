"""Tensors on disk, read one at a time: files are never mapped, whose pages would count as this process's memory."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.pt_archive import check_archive
from fm9g.io.weights import file_offset, load_pt, tensor_bytes

# The types that safetensors files name, and torch has.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAX_HEADER_BYTES = 100_000_000  # bytes, as in the safetensors library
_READAHEAD_BYTES = 1 << 24  # bytes that the system is told to fetch beyond those that are read


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, or rows of one.

    offset: of its first element in the file, in bytes. stride: in elements; None: contiguous, so that its nbytes from
    offset on are all of it, as they are in memory. memory: the tensor, of a file that can only be read as a whole.
    """

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    offset: int
    stride: tuple[int, ...] | None = None
    memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether a copy of the file's bytes is a copy of the tensor."""
        return self.stride is None and self.memory is None

    def rows(self, start: int, end: int) -> LazyTensor:
        """Those of its first dimension, as a tensor of their own."""
        assert 0 <= start <= end <= self.shape[0], (self, start, end)
        stride = self.stride[0] if self.stride else math.prod(self.shape[1:])
        return replace(
            self,
            shape=torch.Size([end - start, *self.shape[1:]]),
            offset=self.offset + start * stride * self.dtype.itemsize,
            memory=None if self.memory is None else self.memory[start:end],
        )

    def read(self) -> torch.Tensor:
        """Its values, contiguous, in memory of their own. Raises UserError where the file has become shorter."""
        if self.memory is not None:
            return self.memory.clone(memory_format=torch.contiguous_format)
        if self.stride is None:
            values = torch.empty(self.shape, dtype=self.dtype)
            self._read_into(values)
            return values
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride)) if self.nbytes else 0
        storage = torch.empty(span, dtype=self.dtype)
        self._read_into(storage)
        return storage.as_strided(self.shape, self.stride).clone(memory_format=torch.contiguous_format)

    def _read_into(self, values: torch.Tensor) -> None:
        if not values.numel():
            return
        buffer = tensor_bytes(values)
        with self.file.open("rb", buffering=0) as file:
            # Whoever reads rows will read the next ones; without this the disk waits between the two.
            os.posix_fadvise(file.fileno(), self.offset + len(buffer), _READAHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done : done + (1 << 30)]], self.offset + done)
                if not count:
                    raise UserError(f"{self.file}: became shorter while it was read; let it be written to its end")
                done += count


@dataclass(frozen=True)
class LazyConcat:
    """Rows of stored tensors, one below the other, as the tensor that is to be made of them.

    dtype: of the values that come out. transform: what is done to rows of them, in the type they have on the disk, and
    the number of the first of these rows; None: nothing. first_row: row of this tensor's own first one.
    """

    parts: tuple[LazyTensor, ...]
    dtype: torch.dtype
    transform: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    first_row: int = 0

    @property
    def shape(self) -> torch.Size:
        one = self.parts[0].shape
        return torch.Size([sum(part.shape[0] for part in self.parts), *one[1:]]) if len(self.parts) > 1 else one

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def file_range(self) -> LazyTensor | None:
        """The bytes of a file that are all of it, as they are; None where its values have to be made."""
        part = self.parts[0]
        same = len(self.parts) == 1 and self.transform is None and part.dtype == self.dtype and part.is_contiguous
        return part if same else None

    def row_chunks(self, nbytes: int) -> Iterator[LazyConcat]:
        """Its rows, some at a time.

        nbytes: the most that a chunk has on the disk; a single row may have more, and what is strided comes whole.
        """
        for row, part in self._parts_with_first_row():
            if not part.shape or part.stride is not None:
                yield LazyConcat((part,), self.dtype, self.transform, row)
                continue
            width = max(1, part.nbytes // max(1, part.shape[0]))
            for start in range(0, part.shape[0], step := max(1, nbytes // width)):
                rows = part.rows(start, min(start + step, part.shape[0]))
                yield LazyConcat((rows,), self.dtype, self.transform, row + start)

    def read(self) -> torch.Tensor:
        """Its values, contiguous, in memory of their own."""
        parts = [self._materialize(row, part) for row, part in self._parts_with_first_row()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _parts_with_first_row(self) -> Iterator[tuple[int, LazyTensor]]:
        """Its parts, each with the number of its first row."""
        row = self.first_row
        for part in self.parts:
            yield row, part
            row += part.shape[0] if part.shape else 0

    def _materialize(self, row: int, part: LazyTensor) -> torch.Tensor:
        values = part.read()
        values = self.transform(values, row) if self.transform else values
        if self.dtype == torch.float16 != part.dtype and values.numel():  # the one type whose largest others pass
            limit = torch.finfo(self.dtype).max
            if any(limit < float(end.abs()) < math.inf for end in values.aminmax()):
                raise UserError(f"{part.file}: holds values beyond {limit:g}, the largest of fp16; choose bf16 or fp32")
        return values.to(self.dtype)


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    The safetensors library reads the header, and so decides which files are whole. Raises UserError.
    """
    register_input(path)
    try:
        with safe_open(path, "numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            described = [(name, part.get_shape(), part.get_dtype()) for name, part in slices]
        with path.open("rb") as content:
            offset = 8 + int.from_bytes(content.read(8), "little")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = _header_problem(path) or str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path}: not a whole safetensors file: {reason}; get or write it again") from None
    tensors = {}
    for name, shape, dtype in described:  # without gaps, which the library refuses
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name}: found {dtype}, which cannot be read; get the model in bf16, fp16 or fp32")
        tensors[name] = LazyTensor(path, torch.Size(shape), SAFETENSORS_DTYPES[dtype], offset)
        offset += tensors[name].nbytes
    return tensors


def _header_problem(path: Path) -> str:
    """What is wrong with a file that the safetensors library refuses, by the name of the tensor; empty: not known."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                return f"its {size} bytes are fewer than its header has"
            if length > _MAX_HEADER_BYTES:
                return f"its header of {length} bytes is longer than the library takes"
            header = json.loads(file.read(length), object_pairs_hook=_reject_duplicate_keys)
        if not isinstance(header, dict):
            return "its header is not a JSON object"
        header.pop("__metadata__", None)
        if odd := next((name for name, entry in header.items() if not _is_tensor_entry(entry)), None):
            return f"{odd}: has no dtype, shape and data_offsets of whole numbers >= 0"
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            needed = math.prod(entry["shape"]) * SAFETENSORS_DTYPES[entry["dtype"]].itemsize
            if last - first != needed:
                return f"{name}: has {last - first} bytes, and {entry['shape']} of {entry['dtype']} are {needed}"
            if first != end:
                return f"{name}: begins at byte {first} of the values, where the tensor before it ends at {end}"
            end = last
        found = size - 8 - length
        return f"its tensors are {end} bytes, and it has {found}" if end != found else ""
    except _DuplicateKeyError as error:
        return f"{error}: is in the header twice"
    except (OSError, ValueError, RecursionError):
        return ""


def _is_tensor_entry(entry: Any) -> bool:
    """Whether an entry of a header is one of a tensor, whatever its numbers are."""
    if not isinstance(entry, dict) or entry.get("dtype") not in list(SAFETENSORS_DTYPES):
        return False
    lists = entry.get("shape"), entry.get("data_offsets")
    if not all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in lists):
        return False
    return len(entry["data_offsets"]) == 2


class _DuplicateKeyError(Exception):
    """A name that a JSON object has twice."""


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise _DuplicateKeyError(name)
    return dict(pairs)


def open_pt(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .pt or .bin file, in its order.

    Raises UserError for a missing file, one that is cut short, and one that holds anything but tensors: nothing in
    it is ever executed. Files from before torch 1.6, compressed ones, and those of machines with the other byte order
    are read whole.
    """
    archive = check_archive(path) if path.is_file() else None
    if archive is None or not archive.is_plain:
        return {
            name: LazyTensor(path, tensor.shape, tensor.dtype, 0, memory=tensor.detach())
            for name, tensor in load_pt(path).items()
        }
    return {name: _lazy_tensor(path, name, tensor, archive.sizes) for name, tensor in load_pt(path, "meta").items()}


def _lazy_tensor(path: Path, name: str, tensor: torch.Tensor, sizes: dict[int, int]) -> LazyTensor:
    """The place of a tensor on the meta device. sizes: of the file's records, by their offset."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise UserError(f"{path}: {name}: found {tensor.layout} {tensor.dtype}, expected a plain tensor of numbers")
    if not tensor.numel():
        return LazyTensor(path, tensor.shape, tensor.dtype, 0)
    begin = file_offset(tensor)
    if begin is None or sizes.get(begin, -1) < tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: not a whole weight file (the bytes of {name} are missing); get or write it again")
    offset = begin + int(tensor.storage_offset()) * tensor.element_size()
    return LazyTensor(
        path, tensor.shape, tensor.dtype, offset, None if tensor.is_contiguous() else tuple(tensor.stride())
    )
