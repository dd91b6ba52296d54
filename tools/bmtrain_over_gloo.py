"""Runs the unmodified Python code of bmtrain 1.0.1 on a CPU, over gloo.

    bmtrain's Python code: sharding, gathering, reducing          unchanged
    bmtrain.C: NCCL and kernels                                   replaced by gloo and torch
    torch.cuda: streams, events, storages                         replaced by stubs

`install()` does that for the whole process, so call it in a process of its own, before the first `import bmtrain`.
It shows nothing about CUDA kernels, streams and NCCL: here everything runs at once and in order, so that a missing wait
has no effect. `install_absent_peers()` replaces the messages, too: the process is rank 0 of others that do not exist.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it late, and it wants to find torch as it was
import torch.distributed as dist

calls: Counter[str] = Counter()  # how often bmtrain called each function of its compiled module
_compiled = ModuleType("bmtrain.C")
_groups: list[Any] = []  # the handle of a communicator is the index of its process group here
_cut: set[str] = set()


@contextlib.contextmanager
def sabotage(*functions: str) -> Iterator[None]:
    """Within the block, the named of ncclAllReduce, ncclReduce, ncclReduceScatter return this rank's part, unreduced.

    A test that still passes does not depend on the reduction. All ranks must enter the block together.
    """
    assert set(functions) <= {"ncclAllReduce", "ncclReduce", "ncclReduceScatter"}, functions
    _cut.update(functions)
    try:
        yield
    finally:
        _cut.difference_update(functions)


def _in_c(name: str, *first: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a function to bmtrain.C under a name, with its first arguments bound."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*rest: Any) -> Any:
            calls[name] += 1
            return function(*first, *rest)

        setattr(_compiled, name, counted)
        return function

    return add


def _at(pointer: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The memory at an address as a tensor (count,)."""
    if not count:  # this rank has no part of the weight; torch.frombuffer rejects it
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), dtype=dtype, count=count)


# --- NCCL. Each communicator is a gloo process group of its own, beside the default group of torch.distributed

_NUMBERS = (  # in the order of ncclDataType_t
    *(torch.int8, torch.uint8, torch.int32, torch.uint32, torch.int64, torch.uint64),
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16),
)
_AVG = 4
_OPS = (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.SUM)


@_in_c("ncclGetUniqueId")
def _unique_id() -> bytes:
    """The path of a file through which the ranks find each other."""
    folder = tempfile.mkdtemp(prefix="bmtrain-stand-in-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # gloo does not delete all of them
    return os.path.join(folder, "store").encode()


@_in_c("ncclCommInitRank")
def _init_rank(unique_id: bytes, size: int, rank: int) -> int:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=120)  # when a rank dies, the others fail soon
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # the machine's name may not resolve
    _groups.append(dist.ProcessGroupGloo(dist.FileStore(unique_id.decode(), size), rank, size, options))
    return len(_groups) - 1


@_in_c("ncclCommDestroy")
def _destroy(group: int) -> None:
    _groups[group] = None


@_in_c("ncclCommCount")
def _size(group: int) -> int:
    return _groups[group].size()


@_in_c("ncclCommUserRank")
def _rank(group: int) -> int:
    return _groups[group].rank()


@_in_c("ncclGroupStart")
@_in_c("ncclGroupEnd")
def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _reduced(name: str, source: int, count: int, dtype: int, op: int, group: int) -> torch.Tensor:
    """A new tensor (count,), the elementwise reduction over the ranks."""
    part = _at(source, count, _NUMBERS[dtype])
    reduced = part.to(torch.float32 if part.dtype in (torch.float16, torch.bfloat16) else part.dtype, copy=True)
    if name not in _cut:
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        _groups[group].allreduce([reduced], options).wait()
    return (reduced / _size(group) if op == _AVG else reduced).to(part.dtype)


@_in_c("ncclAllReduce")
def _all_reduce(source: int, target: int, count: int, dtype: int, op: int, group: int, stream: int) -> None:
    _at(target, count, _NUMBERS[dtype]).copy_(_reduced("ncclAllReduce", source, count, dtype, op, group))


@_in_c("ncclReduce")
def _reduce(source: int, target: int, count: int, dtype: int, op: int, root: int, group: int, stream: int) -> None:
    reduced = _reduced("ncclReduce", source, count, dtype, op, group)
    if _rank(group) == root:
        _at(target, count, reduced.dtype).copy_(reduced)


@_in_c("ncclReduceScatter")
def _reduce_scatter(source: int, target: int, count: int, dtype: int, op: int, group: int, stream: int) -> None:
    reduced = _reduced("ncclReduceScatter", source, count * _size(group), dtype, op, group)
    _at(target, count, reduced.dtype).copy_(reduced.view(-1, count)[_rank(group)])


def _bytes(pointer: int, count: int, dtype: int) -> torch.Tensor:
    """Memory as bytes, for messages without arithmetic: gloo does not know all dtypes."""
    return _at(pointer, count * _NUMBERS[dtype].itemsize, torch.uint8)


@_in_c("ncclAllGather")
def _all_gather(source: int, target: int, count: int, dtype: int, group: int, stream: int) -> None:
    parts = _bytes(target, count * _size(group), dtype).chunk(_size(group))
    _groups[group].allgather([list(parts)], [_bytes(source, count, dtype).clone()]).wait()


@_in_c("ncclBroadcast")
def _broadcast(source: int, target: int, count: int, dtype: int, root: int, group: int, stream: int) -> None:
    values = _bytes(source, count, dtype).clone()
    options = dist.BroadcastOptions()
    options.rootRank = root
    _groups[group].broadcast([values], options).wait()
    _bytes(target, count, dtype).copy_(values)


@_in_c("ncclSend")
def _send(source: int, count: int, dtype: int, peer: int, group: int, stream: int) -> None:
    _groups[group].send([_bytes(source, count, dtype)], peer, 0).wait()


@_in_c("ncclRecv")
def _recv(target: int, count: int, dtype: int, peer: int, group: int, stream: int) -> None:
    _groups[group].recv([_bytes(target, count, dtype)], peer, 0).wait()


# --- the kernels that optimizers call


@_in_c("is_bf16_supported")
def _is_bf16_supported() -> bool:
    return True


@_in_c("to_fp16_from_fp32", torch.float16)
@_in_c("to_bf16_from_fp32", torch.bfloat16)
def _to_half(half: torch.dtype, count: int, source: int, target: int) -> None:
    values = _at(source, count, torch.float32)
    if half == torch.bfloat16:  # the compiled kernel truncates towards zero
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    _at(target, count, half).copy_(values)


@_in_c("has_nan_inf_fp16_launcher", torch.float16)
@_in_c("has_nan_inf_bf16_launcher", torch.bfloat16)
def _has_nan_inf(half: torch.dtype, count: int, values: int, scratch: int, found: int, stream: int) -> None:
    if not _at(values, count, half).isfinite().all():
        _at(found, 1, torch.uint8).fill_(1)


@_in_c("adam_cpu_fp16_launcher", torch.float16)
@_in_c("adam_cpu_bf16_launcher", torch.bfloat16)
def _adam_cpu(half: torch.dtype, count: int, *args: Any) -> None:
    """AdamW with decoupled decay. On random fp32 numbers it equals the compiled kernel up to 5e-7."""
    weight_at, half_at, delta_at, grad_at, mean_at, square_at = args[:6]
    beta1, beta2, eps, lr, scale, decay, correction1, correction2 = args[6:]
    assert not delta_at, "record_delta is not implemented"
    weight, mean, square = (_at(place, count, torch.float32) for place in (weight_at, mean_at, square_at))
    grad = _at(grad_at, count, half).float() / scale
    mean.lerp_(grad, 1 - beta1)
    square.lerp_(grad * grad, 1 - beta2)
    weight.sub_(lr * decay * weight + lr * (mean / correction1) / ((square / correction2).sqrt() + eps))
    _to_half(half, count, weight_at, half_at)


# --- torch.cuda


class _Stream:
    cuda_stream = 0
    __init__ = wait_stream = wait_event = record_event = synchronize = _nothing


class _Event:
    __init__ = record = wait = synchronize = _nothing


def _for_bmtrain(attribute: Any) -> property:
    """An is_cuda that is True for bmtrain, which asserts it everywhere, and correct for all other callers."""

    def is_cuda(self: Any) -> bool:
        return sys._getframe(1).f_globals["__name__"].startswith("bmtrain.") or attribute.__get__(self)

    return property(is_cuda)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with device cuda replaced by cpu, and without pinned memory."""

    def host(value: Any) -> Any:
        is_cuda = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
        return "cpu" if is_cuda else value

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return function(*map(host, args), **{key: host(value) for key, value in kwargs.items()})

    return called


def install() -> None:
    """Prepares this process for `import bmtrain`. torch.cuda.is_available() stays False."""
    if "bmtrain.C" in sys.modules:
        assert sys.modules["bmtrain.C"] is _compiled, "bmtrain is imported already"
        return
    torch.utils._device._device_constructors()  # torch.device("meta") caches these; they must be the originals
    sys.modules["bmtrain.C"] = _compiled
    atexit.register(_groups.clear)  # or gloo's threads abort the process

    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = contextlib.nullcontext
    cuda.set_device = cuda.synchronize = cuda.empty_cache = _nothing
    cuda.current_device = lambda: 0
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    for name in dir(cuda):
        if name.endswith(("Storage", "Tensor")) and hasattr(torch, name):
            setattr(cuda, name, getattr(torch, name))

    tensor: Any = torch.Tensor
    tensor.record_stream = _nothing
    tensor.cuda = tensor.cpu = lambda self, *args, **kwargs: self.clone()  # copies, as between a GPU and the host
    tensor.pin_memory = lambda self, *args: self
    tensor.to = _on_cpu(tensor.to)
    for cls in (torch.Tensor, torch.TypedStorage):
        cls.is_cuda = _for_bmtrain(cls.is_cuda)  # type: ignore[method-assign, assignment]
    for name in ("tensor", "empty", "zeros", "ones", "full"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def install_absent_peers(world_size: int) -> None:
    """As `install`, for rank 0 of world_size processes of which the others do not exist.

    Messages cost no time, and what others would send is a copy of this rank's part.
    """
    install()

    def all_gather(source: int, target: int, count: int, dtype: int, *_: Any) -> None:
        part = _bytes(source, count, dtype)
        _bytes(target, count * world_size, dtype).view(world_size, -1).copy_(part)

    def copy(source: int, target: int, count: int, dtype: int, *_: Any) -> None:
        _bytes(target, count, dtype).copy_(_bytes(source, count, dtype))

    replaced: dict[str, Callable[..., Any]] = {
        "ncclGetUniqueId": lambda: b"",
        "ncclCommInitRank": lambda *_: 0,
        "ncclCommUserRank": lambda *_: 0,
        "ncclCommCount": lambda _: world_size,
        "ncclAllGather": all_gather,
        "ncclAllReduce": copy,
        "ncclBroadcast": copy,
    }
    for name, function in replaced.items():
        setattr(_compiled, name, function)
