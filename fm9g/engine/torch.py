"""The plain torch engine: one process, on a CPU or on one GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from fm9g.engine.base import AdamW
from fm9g.errors import UserError
from fm9g.memory import keep_freed_memory

T = TypeVar("T")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: a GPU that has it, or a CPU with matrix instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class TorchEngine:
    """Engine of one process; see fm9g.engine.base.Engine."""

    rank, world_size = 0, 1

    def __init__(self, device: str, seed: int) -> None:
        """device: auto, cpu or cuda. seed: of dropout. Raises UserError where there is no GPU to use."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda, but torch sees no GPU here; use auto or cpu")
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(seed)

    def prepare(
        self,
        model: torch.nn.Module,
        fill: Callable[[str, torch.Tensor], None],
        optimizer: AdamW,
        dtype: torch.dtype,
        checkpointed: list[torch.nn.Module],
    ) -> None:
        try:
            model.to_empty(device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, too
            raise UserError(f"the model does not fit in the memory of {self.device}: {error}") from None
        for name, weight in model.named_parameters():
            fill(name, weight.data)
        for module in checkpointed:  # from outside, so that no module's name changes
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
        self._model, self._dtype = model.train(), dtype
        by_scale: dict[float, list[torch.nn.Parameter]] = {}
        for name, weight in model.named_parameters():
            by_scale.setdefault(optimizer.lr_scales[name], []).append(weight)
        self._optimizer = torch.optim.AdamW(
            [{"params": weights, "lr_scale": scale} for scale, weights in by_scale.items()],
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def forward(self, batch: Any) -> Any:
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return self._model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        weights = [weight for weight in self._model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(weights, max_norm or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, value: T) -> list[T]:
        return [value]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._model.named_parameters():
            yield name, weight.detach().cpu()

    def optimizer_state(self) -> dict[str, dict[str, torch.Tensor]]:
        state = self._optimizer.state
        return {name: dict(state[weight]) for name, weight in self._model.named_parameters() if weight in state}

    def load_optimizer_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        weights = dict(self._model.named_parameters())
        if odd := sorted(state.keys() ^ weights.keys()):
            raise UserError(f"the optimizer's state and the model do not hold the same weights: {', '.join(odd[:5])}")
        for name, weight in weights.items():
            self._optimizer.state[weight] = {key: value.to(self.device) for key, value in state[name].items()}

    def random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
