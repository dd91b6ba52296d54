"""Tensors in files, read one at a time and only as far as needed.

Files are read at offsets and never mapped: mapped pages would count as memory of this process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from fm9g.errors import UserError
from fm9g.io.os_errors import truncated_error

_READAHEAD_BYTES = 1 << 24  # bytes after the current read that the system should fetch
_MAX_READ_BYTES = 1 << 30  # bytes per system call


class TensorMeta(Protocol):
    """Shape and type of a tensor in memory, on the meta device, or in a file."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the host; no copy if it is contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, or some rows of one.

    Attributes:
        file: the file.
        shape: its shape.
        dtype: its type, in the file and in memory.
        offset: byte offset of its first element.
        stride: in elements; None for a contiguous tensor, which is then `nbytes` bytes at `offset`.
        memory: the tensor itself, if the file can only be read completely.
    """

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    offset: int
    stride: tuple[int, ...] | None = None
    memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether copying bytes of the file copies the tensor."""
        return self.stride is None and self.memory is None

    @property
    def repeats_values(self) -> bool:
        """Whether elements share bytes of the file. Written out, such a tensor could fill the memory."""
        if self.memory is not None:
            return self.memory.nbytes > self.memory.untyped_storage().nbytes()
        return self.stride is not None and self._span() < self.shape.numel()

    def rows(self, start: int, end: int) -> LazyTensor:
        """Rows start to end of its first dimension."""
        assert 0 <= start <= end <= self.shape[0], (self, start, end)
        stride = self.stride[0] if self.stride else math.prod(self.shape[1:])
        return replace(
            self,
            shape=torch.Size([end - start, *self.shape[1:]]),
            offset=self.offset + start * stride * self.dtype.itemsize,
            memory=None if self.memory is None else self.memory[start:end],
        )

    def flat_chunks(self, elements: int) -> Iterator[torch.Tensor]:
        """Its values as flat tensors of at most `elements` elements. A strided tensor is read at once."""
        if not self.is_contiguous:
            yield from torch.split(self.read().view(-1), elements)
            return
        flat = replace(self, shape=torch.Size([self.shape.numel()]))
        for start in range(0, flat.shape[0], elements):
            yield flat.rows(start, min(start + elements, flat.shape[0])).read()

    def read(self) -> torch.Tensor:
        """Its values, contiguous, in new memory. Raises UserError if the file has become shorter."""
        if self.memory is not None:
            return self.memory.clone(memory_format=torch.contiguous_format)
        if self.stride is None:
            values = torch.empty(self.shape, dtype=self.dtype)
            self._read_into(values)
            return values
        storage = torch.empty(self._span(), dtype=self.dtype)
        self._read_into(storage)
        return storage.as_strided(self.shape, self.stride).clone(memory_format=torch.contiguous_format)

    def _span(self) -> int:
        """Elements of the file from its first to its last one."""
        if not self.shape.numel():
            return 0
        assert self.stride is not None
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))

    def _read_into(self, values: torch.Tensor) -> None:
        if not values.numel():
            return
        buffer = tensor_bytes(values)
        with self.file.open("rb", buffering=0) as file:
            # Callers that read rows read the next ones soon; without this hint the disk idles in between.
            os.posix_fadvise(file.fileno(), self.offset + len(buffer), _READAHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            num_read = 0
            while num_read < len(buffer):
                count = os.preadv(
                    file.fileno(), [buffer[num_read : num_read + _MAX_READ_BYTES]], self.offset + num_read
                )
                if not count:
                    raise truncated_error(self.file)
                num_read += count


class LazyStateDict(Mapping[str, torch.Tensor]):
    """The tensors of a file as a state dict. Each lookup reads one tensor from the file.

    meta: the tensors without reading them; use it for names, shapes and types.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.meta = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.meta[name]
        reject_repeated_values(name, tensor)
        return tensor.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


def reject_repeated_values(name: str, tensor: LazyTensor) -> None:
    """Raises UserError for a tensor that is smaller in its file than in memory."""
    if tensor.repeats_values:
        shape = list(tensor.shape)
        raise UserError(f"{tensor.file}: {name}: repeats its values to fill shape {shape}; save it in full")


def tensor_meta(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, TensorMeta]:
    """Shapes and types of a state dict, without reading a lazy one."""
    return tensors.meta if isinstance(tensors, LazyStateDict) else tensors


@dataclass(frozen=True)
class LazyConcat:
    """A tensor to be computed from tensors in files, which are concatenated along the rows.

        part 0  (rows 0-3)   --read--> transform(values, 0) --cast--+
        part 1  (rows 4-5)   --read--> transform(values, 4) --cast--+--> (rows 0-5)

    Attributes:
        parts: the tensors in files.
        dtype: type of the result.
        transform: changes the values of some rows, given them in the type of the file and the number of the first row;
            None: no change.
        first_row: number of this tensor's first row, if it is a chunk of a larger one.
    """

    parts: tuple[LazyTensor, ...]
    dtype: torch.dtype
    transform: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    first_row: int = 0

    @property
    def shape(self) -> torch.Size:
        first = self.parts[0].shape
        return torch.Size([sum(part.shape[0] for part in self.parts), *first[1:]]) if len(self.parts) > 1 else first

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def file_range(self) -> LazyTensor | None:
        """The byte range of a file that is this tensor; None if its values must be computed."""
        part = self.parts[0]
        same = len(self.parts) == 1 and self.transform is None and part.dtype == self.dtype and part.is_contiguous
        return part if same else None

    def row_chunks(self, nbytes: int) -> Iterator[LazyConcat]:
        """Its rows in chunks of at most `nbytes` bytes in the file.

        A single row may be larger, and a strided part is one chunk.
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
        """Its values, contiguous, in new memory."""
        parts = [self._materialize(row, part) for row, part in self._parts_with_first_row()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _parts_with_first_row(self) -> Iterator[tuple[int, LazyTensor]]:
        row = self.first_row
        for part in self.parts:
            yield row, part
            row += part.shape[0] if part.shape else 0

    def _materialize(self, row: int, part: LazyTensor) -> torch.Tensor:
        values = part.read()
        values = self.transform(values, row) if self.transform else values
        if self.dtype == torch.float16 != part.dtype and values.numel():  # the only target type that can overflow
            limit = torch.finfo(self.dtype).max
            if any(limit < float(end.abs()) < math.inf for end in values.aminmax()):
                raise UserError(f"{part.file}: has values beyond {limit:g}, the largest of fp16; choose bf16 or fp32")
        return values.to(self.dtype)
