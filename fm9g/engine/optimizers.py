"""The rules by which optimizers change weights, each over the parts of weights that a process holds.

A rule knows weights by name. What it keeps for a weight is fp32 when it is saved, and of the weight's own shape, so
that any number of processes can go on from it; `Vectors`, which are small, every process holds whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim._adafactor import adafactor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.optim.adamw import adamw

from fm9g.import_utils import import_bitsandbytes


@dataclass(frozen=True)
class OptimizerConfig:
    """name: adamw, adamw8bit, adafactor or muon. lr_scales: weight name -> factor on the learning rate of a step.

    muon_params: the weights that muon orthogonalizes; the others follow adamw. momentum: of muon. ema_decay: of the
    running mean of weights that is kept beside them; 0: none.
    """

    lr_scales: dict[str, float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    name: str = "adamw"
    muon_params: frozenset[str] = frozenset()
    momentum: float = 0.95
    ema_decay: float = 0.0


@dataclass(frozen=True)
class ShardLayout:
    """How weights lie over the processes.

    shape: of the whole weight. all_gather_full: makes the whole tensor from all parts, on every process; all must call
    it in the same order. local_view: the part of a whole tensor that this process holds.
    """

    shape: Callable[[str], torch.Size]
    all_gather_full: Callable[[str, torch.Tensor], torch.Tensor]
    local_view: Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class StepArgs:
    """One step. lr: its learning rate. step_count: (on the device) steps before it. found_inf: (on the device) 1.0
    where nothing is to change, None where that was found out before."""

    lr: float
    step_count: torch.Tensor
    found_inf: torch.Tensor | None = None


class ParamOptimizer(ABC):
    """Changes some weights and keeps what it needs for that."""

    needs_full_tensor = False  # whether every process must take part for each weight, however little it holds
    supports_found_inf = False  # whether it heeds StepArgs.found_inf, so that the host need not know

    def __init__(self, config: OptimizerConfig, layout: ShardLayout) -> None:
        self._config, self._layout = config, layout
        self.state: dict[str, dict[str, torch.Tensor]] = {}

    @abstractmethod
    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        """Makes the state of one more weight. zeros_like_shard: makes zeros, by default of the part's shape and type
        fp32."""

    @abstractmethod
    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        """Changes parts of weights (fp32, in place) by those of their gradients."""

    def export_state(self, name: str, key: str) -> torch.Tensor:
        """A part of the state as it is kept in checkpoints, fp32."""
        return self.state[name][key]

    def load_state(self, name: str, key: str, values: torch.Tensor) -> None:
        self.state[name][key].copy_(values)

    def replicated_shape(self, name: str, key: str) -> torch.Size | None:
        """The shape of what every process holds whole; None: the state is of the weight's shape, and in parts."""
        return None


class AdamW(ParamOptimizer):
    """AdamW (Loshchilov, Hutter 2019): torch's fused function over the parts."""

    supports_found_inf = True

    def init_state(self, name: str, zeros_like_shard: Callable[..., torch.Tensor]) -> None:
        self.state[name] = {"exp_avg": zeros_like_shard(), "exp_avg_sq": zeros_like_shard()}

    def step(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], args: StepArgs) -> None:
        config = self._config
        by_scale: dict[float, list[str]] = {}
        for name in weights:
            by_scale.setdefault(config.lr_scales[name], []).append(name)
        for scale, names in by_scale.items():
            adamw(
                [weights[name] for name in names],
                [grads[name] for name in names],
                [self.state[name]["exp_avg"] for name in names],
                [self.state[name]["exp_avg_sq"] for name in names],
                [],
                # The function counts up what it is given, and wants a counter a weight.
                list(args.step_count.expand(len(names)).clone().unbind()),
                fused=True,
                found_inf=args.found_inf,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=args.lr * scale,
                weight_decay=config.weight_decay,
                eps=config.eps,
                maximize=False,
            )


class AdamW8bit(ParamOptimizer):
    """AdamW with both moments in 8 bits, a scale for each 256 (Dettmers et al. 2021): bitsandbytes' function.

    In checkpoints the moments are fp32; made 8 bits again they are what they were, where the parts are the same.
    """

    MIN_8BIT_SIZE = 4096  # elements below which a weight's moments stay fp32, as in bitsandbytes' own optimizers
    _BLOCK_SIZE = 256

    def __init__(self, config: OptimizerConfig, layout: ShardLayout) -> None:
        """Raises UserError where bitsandbytes is not installed."""
        super().__init__(config, layout)
        functional = import_bitsandbytes("optimizer adamw8bit").functional
        self._lib: Any = functional
        self._codes = {
            "exp_avg": functional.create_dynamic_map(signed=True),
            "exp_avg_sq": functional.create_dynamic_map(signed=False),
        }
        # bitsandbytes' map ends at -0.993: a block whose largest value is negative would come back smaller.
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
        config, number = self._config, int(args.step_count) + 1  # the one time that it waits
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
                step=number,
                lr=args.lr * config.lr_scales[name],
                qmap1=self._codes["exp_avg"],
                qmap2=self._codes["exp_avg_sq"],
                absmax1=state["exp_avg.scales"],
                absmax2=state["exp_avg_sq.scales"],
                weight_decay=config.weight_decay,
            )

    def export_state(self, name: str, key: str) -> torch.Tensor:
        state = self.state[name]
        if not state[key].numel():
            return state[key].float()
        return self._lib.dequantize_blockwise(
            state[key], absmax=state[f"{key}.scales"], code=self._codes[key], blocksize=self._BLOCK_SIZE
        )

    def load_state(self, name: str, key: str, values: torch.Tensor) -> None:
        # To the nearest code. bitsandbytes' function searches less exactly, and would not give back what was saved.
        blocks = F.pad(values.flatten(), (0, -values.numel() % self._BLOCK_SIZE)).view(-1, self._BLOCK_SIZE)
        scales = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
        borders = (self._codes[key][1:] + self._codes[key][:-1]) / 2
        codes = torch.searchsorted(borders, blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        self.state[name][key].copy_(codes.flatten()[: values.numel()].view_as(values))
        self.state[name][f"{key}.scales"].copy_(scales)


class Adafactor(ParamOptimizer):
    """Adafactor (Shazeer, Stern 2018), torch's function: of a matrix, means of squared gradients by row and by column.

    The learning rate is relative to the root mean square of the weight. Gradients and weights are gathered, one at a
    time.
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
                weight_decay=self._config.weight_decay,
                eps1=None,  # type: ignore[arg-type]  # that of the weight's type
                eps2=1e-3,
                maximize=False,
            )
            weight.copy_(self._layout.local_view(name, full))


class Muon(ParamOptimizer):
    """Muon (Jordan et al. 2024) with updates as large as AdamW's (Liu et al. 2025: 0.2 * sqrt(max(rows, columns))), so
    that learning rate and weight decay mean the same for all weights. The update is gathered, a matrix at a time.
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
            weight.mul_(1 - lr * self._config.weight_decay)
            weight.add_(self._layout.local_view(name, full), alpha=-lr * (0.2 * max(full.shape) ** 0.5))


def build_optimizers(
    shapes: dict[str, torch.Size], config: OptimizerConfig, layout: ShardLayout
) -> dict[str, ParamOptimizer]:
    """The rule of each weight. Raises UserError where one cannot be used here."""
    default = AdamW(config, layout)
    if config.name == "adamw":
        return dict.fromkeys(shapes, default)
    if config.name == "adamw8bit":
        adamw8bit = AdamW8bit(config, layout)
        return {
            name: adamw8bit if shape.numel() >= adamw8bit.MIN_8BIT_SIZE else default for name, shape in shapes.items()
        }
    if config.name == "adafactor":
        return dict.fromkeys(shapes, Adafactor(config, layout))
    muon = Muon(config, layout)
    return {name: muon if name in config.muon_params else default for name in shapes}
