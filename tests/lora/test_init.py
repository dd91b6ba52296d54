"""Initial values of adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fm9g.config.adapter import AdapterConfig
from fm9g.lora.init import AdapterInit
from fm9g.lora.inject import A, B


class OneLayer:
    """The trained tensors of a layer "x", as an engine exports them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.meta = {name: tensor.to("meta") for name, tensor in tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors.items())


def initial_values(weight_init: AdapterInit, base: torch.Tensor, r: int) -> tuple[torch.Tensor, ...]:
    """The weight of layer "x" in the model, A and B."""
    tensors = torch.empty_like(base), torch.empty(r, base.shape[1]), torch.empty(base.shape[0], r)
    for name, tensor in zip(("x.weight", "x" + A, "x" + B), tensors):
        weight_init.init_weight(name, tensor)
    return tensors


def test_without_pissa_the_base_is_unchanged_and_b_is_zero() -> None:
    base = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    config = AdapterConfig(r=2, alpha=4.0, layers=["x"])
    weight, a, b = initial_values(AdapterInit(config, ["x"], lambda _: base, "default", 1), base, 2)
    assert torch.equal(weight, base)
    assert a.any()
    assert not b.any()


def test_a_pissa_file_applies_to_the_original_base_and_training_continues_from_it() -> None:
    base = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    config = AdapterConfig(r=2, alpha=4.0, layers=["x"], pissa=True)
    weight_init = AdapterInit(config, ["x"], lambda _: base, "pissa", 1)
    weight, a, b = initial_values(weight_init, base, 2)
    torch.testing.assert_close(weight + config.scaling * b @ a, base)
    assert not torch.allclose(weight, base)

    a, b = a + 0.1, b - 0.2  # as if trained
    in_file = dict(weight_init.for_file(OneLayer({"x" + A: a, "x" + B: b})))
    assert (in_file["x" + A].shape, in_file["x" + B].shape) == ((4, 6), (5, 4))
    trained = weight + config.scaling * b @ a
    torch.testing.assert_close(base + config.scaling * in_file["x" + B] @ in_file["x" + A], trained)

    resumed = initial_values(AdapterInit(config, ["x"], lambda _: base, "pissa", 1, in_file), base, 2)
    for value, expected in zip(resumed, (weight, a, b)):
        torch.testing.assert_close(value, expected)
