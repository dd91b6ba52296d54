"""Lets the unmodified Python code of bmtrain 1.0.1 run on the tensors of fake_gpu, which have no values.

`install()` replaces, for the whole process, bmtrain's compiled module, and what in torch would read memory that is not
there: typed storages, and subclasses of tensors. It belongs into a process of its own, within `fake_gpu`, before the
first `import bmtrain`. Real values and messages are those of bmtrain_over_gloo.
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
_sizes: list[int] = []  # processes of each communicator, of which this is the first


def _communicator(unique_id: bytes, size: int, rank: int) -> int:
    assert rank == 0
    _sizes.append(size)
    return len(_sizes) - 1


_HOST = {  # of bmtrain.C, what gives the GPU nothing to do
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
    """Its storage, which says where it is: that of a fake tensor says "meta"."""
    storage = _storage(tensor)
    storage.place = tensor.device
    return storage


def _subclass(cls: type, data: torch.Tensor, requires_grad: bool = False, **others: Any) -> torch.Tensor:
    """What Tensor._make_subclass makes, a fake tensor where it is made of one."""
    if not isinstance(data, FakeTensor):
        return _make_subclass(cls, data, requires_grad, **others)
    tensor: Any = data.detach().requires_grad_(requires_grad)
    tensor.__class__ = _fake_kind(cls)
    return tensor


@functools.cache
def _fake_kind(cls: type) -> type:
    return type(cls.__name__, (cls, FakeTensor), {})


def install() -> None:
    """Makes `import bmtrain` work in this process."""
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
