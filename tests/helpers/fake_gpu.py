"""A GPU that computes nothing: tensors on "cuda" without values, on any machine, for full steps of training.

    host program ──> FakeGPU (torch's FakeTensorMode) ──> shape, dtype, device of each result, no values
                       │ mixed devices: error, as on a GPU
                       └ .item(), copies, synchronize(): recorded in `waits`, with the line that waits

It replaces torch.cuda for the whole process, so use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (it makes the backend known)

import fm9g.engine.fsdp
from fm9g.engine.dist_context import DistContext

_META = torch.device("meta")
_aten = torch.ops.aten
_LIBRARIES = re.compile(r"site-packages/(?!bmtrain/)")
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_BY_INDEX = (_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class FakeGPU(FakeTensorMode):
    """waits: a line per time that the host waited for work of the GPU that it had not waited for before."""

    avoid_device_init = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.launched = self.finished = 0

    def take(self) -> list[str]:
        """The waits since the last call."""
        waits, self.waits = self.waits, []
        return waits

    def wait(self, why: str, until: int | None = None) -> None:
        """Records that the host waits for the first `until` operations of the GPU; None: for all."""
        until = self.launched if until is None else until
        if until > self.finished:
            self.waits.append(f"{why} at {_place()}")
            self.finished = until

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == _META and func is not _aten._to_copy.default:
            kwargs["device"] = torch.device("cuda", 0)  # created in C++, for which the GPU is "meta"; see install
        if func is _aten._fused_sgd_.default:  # torch does not know its results; they are those of another update
            func, args, kwargs = _aten._foreach_add_.List, args[:2], {}
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if func is _aten._local_scalar_dense.default:
            return self._number(args[0])
        masks = func in _BY_INDEX and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masks and args[2].numel() > 1:  # one number is filled in
            self.wait("a mask as an index")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        if kwargs.get("pin_memory"):
            _pin(result)
        if func in _COPIES:
            self._copied(func, args, kwargs, result)
        if isinstance(result, torch.Tensor):
            tensors.append(result)
        if any(_on_gpu(tensor) for tensor in tensors) and not _is_view(func):
            self.launched += 1
        return result

    def _number(self, tensor: torch.Tensor) -> Any:
        """The value of a number, which is unknown: 1."""
        if _on_gpu(tensor):
            self.wait(".item()")
        else:
            with contextlib.suppress(DataDependentOutputException):
                return super().__torch_dispatch__(_aten._local_scalar_dense.default, (), (tensor,))
        return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1

    def _copied(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        """The host waits for a copy from or to the GPU, unless it is non_blocking and its host memory is pinned."""
        source, target = (args[1], args[0]) if func is _aten.copy_.default else (args[0], result)
        non_blocking = args[2] if func is _aten.copy_.default and len(args) > 2 else kwargs.get("non_blocking", False)
        if _on_gpu(source) == _on_gpu(target) or not source.numel():
            return
        host = source if _on_gpu(target) else target
        if func is _aten._to_copy.default and non_blocking and host is target:
            _pin(target)  # as torch does
        if not non_blocking or not is_pinned(host):
            self.launched += 1
            self.wait("a copy from the host" if host is source else "a copy to the host")


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _is_view(func: Any) -> bool:
    return any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)


def _pin(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().pinned = True  # type: ignore[attr-defined]


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def _place() -> str:
    """The innermost line of fm9g, bmtrain or a test on the stack."""
    frame = sys._getframe(2)
    while frame.f_back and (_LIBRARIES.search(frame.f_code.co_filename) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or torch.cuda.Event()
        event.record()
        return event

    def synchronize(self) -> None:
        current_gpu().wait("a stream's synchronize()")


class _Event:
    """The slowest possible GPU: an event is past only once the host has waited for it or for later work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._when = 0

    def record(self, stream: Any = None) -> None:
        self._when = current_gpu().launched

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return current_gpu().finished >= self._when

    def synchronize(self) -> None:
        current_gpu().wait("an event's synchronize()", self._when)

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def current_gpu() -> FakeGPU:
    gpu = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(gpu, FakeGPU)
    return gpu


def _nothing(*_: Any, **__: Any) -> None: ...


def install(world_size: int = 1) -> None:
    """Makes torch report a GPU for each of world_size processes, of which this is the first."""
    # Autograd in C++ would ask the CUDA library, which is missing, for streams; for "meta" it does not.
    fake_tensor._DISPATCH_META_HANDLERS[torch.ops.prim.device.default] = lambda args: _META
    DTensor.device = property(lambda self: self._local_tensor.device)  # type: ignore[assignment]
    FakeTensor.is_cuda = DTensor.is_cuda = property(_on_gpu)  # type: ignore[assignment]
    cuda: Any = torch.cuda
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: world_size,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "max_memory_allocated": lambda device=None: 0,
        "memory_stats": lambda device=None: {},
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "synchronize": lambda device=None: current_gpu().wait("torch.cuda.synchronize()"),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": contextlib.nullcontext,
        "Stream": _Stream,
        "Event": _Event,
        **dict.fromkeys(("set_device", "empty_cache", "manual_seed_all", "reset_peak_memory_stats"), _nothing),
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.backends.cuda.can_use_flash_attention = lambda *_: True
    torch.accelerator.current_stream = cuda.current_stream
    torch.Generator = _Generator  # type: ignore[misc]
    torch.Tensor.pin_memory = _pinned_copy  # type: ignore[method-assign, assignment]
    # Meshes are tensors of ranks on the host, and need values.
    fm9g.engine.fsdp.init_device_mesh = with_values(fm9g.engine.fsdp.init_device_mesh)
    for name in ("__getitem__", "_flatten", "get_local_rank"):
        setattr(DeviceMesh, name, with_values(getattr(DeviceMesh, name)))
    DeviceMesh._concatenate = staticmethod(with_values(DeviceMesh._concatenate))


def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return wrapper


def _pinned_copy(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    copy = torch.empty_like(self, pin_memory=True)
    _pin(copy)
    return copy


class FakeDistContext(DistContext):
    """The first of world_size processes. Messages of the others, which do not exist, equal its own."""

    def __init__(self, world_size: int = 1) -> None:
        make = dist.init_process_group
        with (
            mock.patch.object(dist, "init_process_group", lambda _, **other: make("fake", **other)),
            mock.patch.object(dist, "new_group", return_value=None),
        ):
            super().__init__("cuda", 0, world_size, 0, world_size, dist.HashStore())

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        return [number * self.world_size for number in numbers]

    def all_reduce_sum_floats(self, numbers: Sequence[float]) -> list[float]:
        return [float(number) * self.world_size for number in numbers]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def broadcast_object(self, value: Any) -> Any:
        return value


@contextlib.contextmanager
def fake_gpu(world_size: int = 1) -> Iterator[tuple[FakeGPU, DistContext]]:
    """Within the block, this process is the first of world_size processes with a GPU each.

    It destroys the default group of torch.distributed, if there is one, and creates another one afterwards.
    """
    had_group = dist.is_initialized()
    if had_group:
        dist.destroy_process_group()
    install(world_size)
    with (
        FakeDistContext(world_size) as dist_context,
        FakeGPU() as gpu,
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield gpu, dist_context
    if had_group:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
