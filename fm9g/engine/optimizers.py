"""The update rules of optimizers, over the shards of weights that a process holds.

A rule knows weights by name. In checkpoints its state is fp32, with one tensor of the weight's shape per key, so that
any number of processes can resume from it. Small state, such as the row and column means of Adafactor, is replicated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim._adafactor import adafactor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fm9g.import_utils import import_bitsandbytes


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Args:
        lr_scales: weight name to its factor on the learning rate of a step.
        weight_decay: of all weights except those of no_decay.
        name: adamw, adamw8bit, adafactor, muon or sgd.
        muon_params: the weights that muon orthogonalizes; it updates the others by adamw.
        momentum: of muon or sgd.
        ema_decay: of the running mean of weights; 0: none.
        no_decay: the weights without weight decay.
    """

    lr_scales: dict[str, float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    name: str = "adamw"
    muon_params: frozenset[str] = frozenset()
    momentum: float = 0.95
    ema_decay: float = 0.0
    no_decay: frozenset[str] = frozenset()

    def decay_of(self, name: str) -> float:
        """The weight decay of a weight."""
        return 0.0 if name in self.no_decay else self.weight_decay

    def groups(self, names: Iterable[str]) -> dict[tuple[float, float], list[str]]:
        """The names by (factor on the learning rate, weight decay), as torch's functions take one of each per call."""
        groups: dict[tuple[float, float], list[str]] = {}
        for name in names:
            groups.setdefault((self.lr_scales[name], self.decay_of(name)), []).append(name)
        return groups


@dataclass(frozen=True)
class ShardLayout:
    """How weights are distributed over the processes, by weight name.

    Args:
        shape: returns the shape of the full weight.
        all_gather_full: returns the full tensor on every process, from this process's part. All processes must call it
            in the same order.
        local_view: returns this process's part of a full tensor.
    """

    shape: Callable[[str], torch.Size]
    all_gather_full: Callable[[str, torch.Tensor], torch.Tensor]
    local_view: Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class StepArgs:
    """Arguments of one update.

    Args:
        lr: learning rate of the step.
        step_count: steps before it, on the device.
        found_inf: on the device, 1.0 if the step must change nothing; None: it may change weights.
    """

    lr: float
    step_count: torch.Tensor
    found_inf: torch.Tensor | None = None


class ParamOptimizer(ABC):
    """The update rule of some weights, with its state: weight name to key to tensor."""

    needs_full_tensor = False  # whether every process must take part in each weight's step, even without a part of it
    supports_found_inf = False  # whether it respects StepArgs.found_inf, so that the host need not know

    def __init__(self, config: OptimizerConfig, layout: ShardLayout) -> None:
        self._config, self._layout = config, layout
        self.state: dict[str, dict[str, torch.Tensor]] = {}

    @abstractmethod
    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        """Creates the state of a weight.

        Args:
            zeros_like_shard: creates zeros, by default fp32 and of the shape of this process's part; keyword arguments
                shape and dtype change that.
        """

    @abstractmethod
    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        """Updates this process's parts of weights (fp32, in place) by those of their gradients."""

    def export_state(self, name: str, key: str) -> torch.Tensor:
        """This process's part of a state tensor as checkpoints contain it, fp32."""
        return self.state[name][key]

    def load_state(self, name: str, key: str, values: torch.Tensor) -> None:
        """Restores a result of export_state."""
        self.state[name][key].copy_(values)

    def replicated_shape(self, name: str, key: str) -> torch.Size | None:
        """The shape of a state tensor that every process holds in full; None: it is sharded like the weight."""
        return None


class AdamW(ParamOptimizer):
    """AdamW (Loshchilov, Hutter 2019) by torch's fused function."""

    supports_found_inf = True

    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        self.state[name] = {"exp_avg": zeros_like_shard(), "exp_avg_sq": zeros_like_shard()}

    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        config = self._config
        for (scale, weight_decay), names in config.groups(weights).items():
            adamw(
                [weights[name] for name in names],
                [grads[name] for name in names],
                [self.state[name]["exp_avg"] for name in names],
                [self.state[name]["exp_avg_sq"] for name in names],
                [],
                # The function increments its counters, and needs one per weight.
                list(args.step_count.expand(len(names)).clone().unbind()),
                fused=True,
                found_inf=args.found_inf,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=args.lr * scale,
                weight_decay=weight_decay,
                eps=config.eps,
                maximize=False,
            )


class SGD(ParamOptimizer):
    """Stochastic gradient descent with momentum (Polyak 1964) by torch's fused function.

    As in torch, weight decay is part of the gradient, and so of the momentum.
    """

    supports_found_inf = True

    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        # torch's buffer starts as the first gradient, which is the update of a buffer of zeros.
        self.state[name] = {"momentum_buffer": zeros_like_shard()} if self._config.momentum else {}

    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        for (scale, weight_decay), names in self._config.groups(weights).items():
            sgd(
                [weights[name] for name in names],
                [grads[name] for name in names],
                [self.state[name].get("momentum_buffer") for name in names],
                fused=True,
                found_inf=args.found_inf,
                weight_decay=weight_decay,
                momentum=self._config.momentum,
                lr=args.lr * scale,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


class AdamW8bit(ParamOptimizer):
    """AdamW with both moments in 8 bits, one scale per 256 values (Dettmers et al. 2021), by bitsandbytes' function.

    In checkpoints the moments are fp32. Loaded by the same number of processes, they become the same 8 bits again.
    """

    MIN_8BIT_SIZE = 4096  # moments of smaller weights stay fp32, as in bitsandbytes' own optimizers
    _BLOCK_SIZE = 256

    def __init__(self, config: OptimizerConfig, layout: ShardLayout) -> None:
        """Raises UserError if bitsandbytes is not installed."""
        super().__init__(config, layout)
        functional = import_bitsandbytes("optimizer adamw8bit").functional
        self._lib: Any = functional
        self._codes = {
            "exp_avg": functional.create_dynamic_map(signed=True),
            "exp_avg_sq": functional.create_dynamic_map(signed=False),
        }
        # bitsandbytes' map ends at -0.993, which would shrink a block whose largest value is negative.
        self._codes["exp_avg"][0] = -1.0

    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        blocks = -(-zeros_like_shard().numel() // self._BLOCK_SIZE)
        self.state[name] = {key: zeros_like_shard(dtype=torch.uint8) for key in self._codes}
        device = self.state[name]["exp_avg"].device
        self._codes = {key: code.to(device) for key, code in self._codes.items()}
        for key in self._codes:
            self.state[name][f"{key}.scales"] = torch.zeros(blocks, device=device)
            self.load_state(name, key, torch.zeros(self.state[name][key].shape, device=device))

    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        config, step = self._config, int(args.step_count) + 1  # the host waits for the device here
        for name, weight in weights.items():
            state = self.state[name]
            self._lib.optimizer_update_8bit_blockwise(
                "adam",
                grads[name].contiguous(),
                weight,
                state["exp_avg"],
                state["exp_avg_sq"],
                beta1=config.betas[0],
                beta2=config.betas[1],
                beta3=0.0,
                alpha=0.0,
                eps=config.eps,
                step=step,
                lr=args.lr * config.lr_scales[name],
                qmap1=self._codes["exp_avg"],
                qmap2=self._codes["exp_avg_sq"],
                absmax1=state["exp_avg.scales"],
                absmax2=state["exp_avg_sq.scales"],
                weight_decay=config.decay_of(name),
            )

    def export_state(self, name: str, key: str) -> torch.Tensor:
        state = self.state[name]
        if not state[key].numel():
            return state[key].float()
        values: torch.Tensor = self._lib.dequantize_blockwise(
            state[key], absmax=state[f"{key}.scales"], code=self._codes[key], blocksize=self._BLOCK_SIZE
        )
        return values

    def load_state(self, name: str, key: str, values: torch.Tensor) -> None:
        # To the nearest code: bitsandbytes' own search is less exact, and would not restore the saved codes.
        blocks = F.pad(values.flatten(), (0, -values.numel() % self._BLOCK_SIZE)).view(-1, self._BLOCK_SIZE)
        scales = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
        borders = (self._codes[key][1:] + self._codes[key][:-1]) / 2
        codes = torch.searchsorted(borders, blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        self.state[name][key].copy_(codes.flatten()[: values.numel()].view_as(values))
        self.state[name][f"{key}.scales"].copy_(scales)


class Adafactor(ParamOptimizer):
    """Adafactor (Shazeer, Stern 2018) by torch's function: means of a matrix's squared gradients by row and by column.

    The learning rate is relative to the root mean square of the weight. Each process gathers weights and gradients, one
    at a time, and updates the full weight.
    """

    needs_full_tensor = True

    def __init__(self, config: OptimizerConfig, layout: ShardLayout) -> None:
        super().__init__(config, layout)
        self._replicated_shapes: dict[str, dict[str, torch.Size]] = {}

    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        shape = self._layout.shape(name)
        replicated_shapes = (
            {"row_var": torch.Size([shape[0], 1]), "col_var": torch.Size([1, shape[1]])} if len(shape) > 1 else {}
        )
        self._replicated_shapes[name] = replicated_shapes or {"variance": shape}
        self.state[name] = {key: zeros_like_shard(shape=size) for key, size in self._replicated_shapes[name].items()}

    def replicated_shape(self, name: str, key: str) -> torch.Size | None:
        return self._replicated_shapes[name][key]

    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        for name, weight in weights.items():
            state = self.state[name]
            full = self._layout.all_gather_full(name, weight)
            adafactor(
                [full],
                [self._layout.all_gather_full(name, grads[name])],
                [state.get("row_var")],
                [state.get("col_var")],
                [state.get("variance")],
                [args.step_count.clone()],
                foreach=False,
                d=1.0,
                lr=args.lr * self._config.lr_scales[name],
                beta2_decay=-0.8,
                weight_decay=self._config.decay_of(name),
                eps1=None,  # type: ignore[arg-type]  # that of the weight's dtype
                eps2=1e-3,
                maximize=False,
            )
            weight.copy_(self._layout.local_view(name, full))


class Muon(ParamOptimizer):
    """Muon (Jordan et al. 2024) with updates as large as AdamW's (Liu et al. 2025: 0.2 * sqrt(max(rows, columns))).

    So learning rate and weight decay mean the same for all weights. Each process gathers the updates, one matrix at a
    time, to orthogonalize them.
    """

    needs_full_tensor = True
    _NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5, 1e-7  # coefficients, iterations, epsilon

    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        self.state[name] = {"momentum": zeros_like_shard()}

    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        momentum = self._config.momentum
        for name, weight in weights.items():
            mean = self.state[name]["momentum"].lerp_(grads[name], 1 - momentum)
            full = self._layout.all_gather_full(name, grads[name].lerp(mean, momentum))
            full = _zeropower_via_newtonschulz(full, *self._NEWTON_SCHULZ).contiguous()
            lr = args.lr * self._config.lr_scales[name]
            weight.mul_(1 - lr * self._config.decay_of(name))
            weight.add_(self._layout.local_view(name, full), alpha=-lr * (0.2 * max(full.shape) ** 0.5))


def build_optimizers(
    shapes: dict[str, torch.Size], config: OptimizerConfig, layout: ShardLayout
) -> dict[str, ParamOptimizer]:
    """The update rule of each weight; weights with the same rule share an object.

    Args:
        shapes: names and shapes of the weights.

    Raises:
        UserError: if the package of an optimizer is not installed.
    """
    default = AdamW(config, layout)
    if config.name == "adamw":
        return dict.fromkeys(shapes, default)
    if config.name == "sgd":
        return dict.fromkeys(shapes, SGD(config, layout))
    if config.name == "adamw8bit":
        adamw8bit = AdamW8bit(config, layout)
        return {
            name: adamw8bit if shape.numel() >= adamw8bit.MIN_8BIT_SIZE else default for name, shape in shapes.items()
        }
    if config.name == "adafactor":
        return dict.fromkeys(shapes, Adafactor(config, layout))
    muon = Muon(config, layout)
    return {name: muon if name in config.muon_params else default for name in shapes}
