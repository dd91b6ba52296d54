"""Kernels against attention by document, copies from pinned memory, and memory against the forecast of `fm9g plan`."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.gpu_harness import REHEARSAL
from helpers.common import LENGTHS as BATCH_LENGTHS
from helpers.common import make_batch

from fm9g.config.model import ModelConfig
from fm9g.model import attention
from fm9g.plan.job import JobConfig
from fm9g.plan.memory import peak_memory
from fm9g.train.batch import to_device

LENGTHS = [37, 1, 300, 128, 7]


@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "shared", "window"), [(8, 8, 0), (8, 2, 0), (8, 2, 24), (8, 8, 1)])
def test_a_kernel_gives_what_torch_gives_document_by_document(
    gpus: int,
    kernel: str,
    dtype: torch.dtype,
    heads: int,
    shared: int,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Both in half precision: the kernel may differ from fp32 by twice as much as torch does."""
    if REHEARSAL:
        pytest.skip("kernels need GPUs; tests/model/test_attention.py tests which is used")
    if kernel == "flash_attn":
        request.getfixturevalue("flash_attn")
    else:
        monkeypatch.setattr(attention, "flash_attn_kernel", lambda: None)
    borders = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    tokens = sum(LENGTHS)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, 64, device="cuda", generator=generator).to(dtype)

    inputs, weight = [draw(heads), draw(shared), draw(shared)], draw(heads)
    assert attention.packed_kernel(inputs[0], inputs[1], flash=True) == kernel

    def run(flash: bool, kind: torch.dtype) -> list[torch.Tensor]:
        given = [tensor.detach().to(kind).requires_grad_() for tensor in inputs]
        output = attention.varlen_attention(*given, borders, LENGTHS, flash, window=window)
        (output * weight.to(kind)).sum().backward()
        return [output.detach(), *(tensor.grad for tensor in given)]

    exact, usual, fast, again = run(False, torch.float32), run(False, dtype), run(True, dtype), run(True, dtype)
    for name, right, one, other, repeated in zip(("output", "query", "key", "value"), exact, usual, fast, again):
        assert torch.equal(other, repeated), f"{name}: two runs differ"
        allowed = 2 * (one.float() - right).abs().max() + 1e-3
        assert (other.float() - right).abs().max() <= allowed, name


def test_flash_attention_equals_attention_by_document(flash_attn: None) -> None:
    if REHEARSAL:
        pytest.skip("kernels need GPUs")
    query, key, value = (torch.randn(88, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu_seqlens = make_batch().cu_seqlens.cuda()
    for window in (0, 9):
        flash, plain = (
            attention.varlen_attention(query, key, value, cu_seqlens, BATCH_LENGTHS, flash, window=window)
            for flash in (True, False)
        )
        torch.testing.assert_close(flash, plain, rtol=2e-2, atol=2e-2)


def test_batches_arrive_intact_from_pinned_memory(gpus: int) -> None:
    device = torch.device("cpu" if REHEARSAL else "cuda")
    arrays = [np.arange(size, dtype=kind) for size in (0, 1, 100_000) for kind in (np.int32, np.int64, np.float32)]
    for _ in range(20):  # pinned blocks are reused while copies are in flight
        if not REHEARSAL:
            torch.cuda._sleep(1_000_000)
        moved = [to_device(array + 0, device) for array in arrays]
        assert all(np.array_equal(tensor.cpu().numpy(), array) for tensor, array in zip(moved, arrays))


MODEL = ModelConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_layers=8, num_heads=16)


@pytest.mark.parametrize(
    "setup",
    [
        {},
        {"activation_checkpoint": "full"},
        {"activation_checkpoint": "selective", "zero_level": 2, "gradient_accumulation_steps": 2},
        {"activation_checkpoint": "full", "offload_optimizer": True},
        {"engine": "bmtrain"},
        {"engine": "bmtrain", "activation_checkpoint": "full", "zero_level": 2},
        {"engine": "bmtrain", "activation_checkpoint": "full", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_memory_is_what_is_planned_within_15_percent(
    gpus: int, setup: dict, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if setup.get("engine") == "bmtrain":
        request.getfixturevalue("bmtrain")
    if REHEARSAL:
        pytest.skip("tests/plan/ does this on CPUs")
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "plan" / "measure.py"
    spec = importlib.util.spec_from_file_location("plan_measure_on_gpus", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    chosen = JobConfig(**{"max_length": 2048, **setup})
    assert peak_memory(MODEL, chosen).total == pytest.approx(module.measure_apart(MODEL, chosen, "cuda"), rel=0.15)
