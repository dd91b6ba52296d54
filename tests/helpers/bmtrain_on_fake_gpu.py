"""Runs the unmodified Python code of bmtrain 1.0.1 on the tensors of fake_gpu, which have no values.

`install()` replaces bmtrain's compiled module for the whole process, and the parts of torch that would read memory of a
tensor: typed storages, and subclasses of tensors. Call it in a process of its own, within `fake_gpu`, before the first
`import bmtrain`. For real values and messages, see tools/bmtrain_over_gloo.py.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import torch
from helpers.fake_gpu import current_gpu
from torch._subclasses.fake_tensor import FakeTensor

_TYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Short": torch.int16,
    "Int": torch.int32,
}
_make_subclass: Any = torch.Tensor._make_subclass
_storage: Any = torch.Tensor.storage
_sizes: list[int] = []  # world size of each communicator; this process is rank 0


def _communicator(unique_id: bytes, size: int, rank: int) -> int:
    assert rank == 0
    _sizes.append(size)
    return len(_sizes) - 1


_HOST = {  # functions of bmtrain.C without work for the GPU
    "ncclGetUniqueId": lambda: b"fake",
    "ncclCommInitRank": _communicator,
    "ncclCommCount": _sizes.__getitem__,
    "ncclCommUserRank": lambda communicator: 0,
    "is_bf16_supported": lambda: True,
}
_MESSAGES = [
    f"nccl{name}" for name in ("GroupStart", "GroupEnd", "AllReduce", "ReduceScatter", "AllGather", "Broadcast")
]


def _launch(*_: Any) -> None:
    current_gpu().launched += 1


def _storage_of_size(dtype: torch.dtype, size: int) -> torch.TypedStorage:
    return torch.empty(size, dtype=dtype, device="cuda").storage()


def _storage_of(tensor: torch.Tensor) -> torch.TypedStorage:
    """A storage that reports the tensor's device; that of a fake tensor would report "meta"."""
    storage = _storage(tensor)
    storage.place = tensor.device
    return storage


def _subclass(cls: type, data: torch.Tensor, requires_grad: bool = False, **others: Any) -> torch.Tensor:
    """Tensor._make_subclass, which returns a fake tensor for a fake tensor."""
    if not isinstance(data, FakeTensor):
        return _make_subclass(cls, data, requires_grad, **others)
    tensor: Any = data.detach().requires_grad_(requires_grad)
    tensor.__class__ = _fake_kind(cls)
    return tensor


@functools.cache
def _fake_kind(cls: type) -> type:
    return type(cls.__name__, (cls, FakeTensor), {})


def install() -> None:
    """Prepares this process for `import bmtrain`."""
    compiled = ModuleType("bmtrain.C")
    compiled.__dict__.update(_HOST, **dict.fromkeys(_MESSAGES, _launch))
    sys.modules["bmtrain.C"] = compiled
    kinds = {dtype: functools.partial(_storage_of_size, dtype) for dtype in _TYPES.values()}
    cuda: Any = torch.cuda
    for name, dtype in _TYPES.items():
        setattr(cuda, f"{name}Storage", kinds[dtype])
    cuda.FloatTensor = functools.partial(torch.tensor, dtype=torch.float32, device="cuda")
    tensor: Any = torch.Tensor
    tensor.storage = _storage_of
    tensor.storage_type = lambda self: kinds[self.dtype]
    tensor.record_stream = lambda self, stream: None
    tensor._make_subclass = staticmethod(_subclass)
    storage: Any = torch.TypedStorage
    storage.device = property(lambda self: self.place)
    storage.is_cuda = property(lambda self: self.place.type == "cuda")
    storage.data_ptr = lambda self: 0
