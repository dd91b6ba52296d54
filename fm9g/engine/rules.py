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

from fm9g.packages import import_bitsandbytes


@dataclass(frozen=True)
class OptimizerSettings:
    """name: adamw, adamw8bit, adafactor or muon. lr_scales: weight name -> factor on the learning rate of a step.

    matrices: the weights that muon orthogonalizes; the others follow adamw. momentum: of muon. ema_decay: of the
    running mean of weights that is kept beside them; 0: none.
    """

    lr_scales: dict[str, float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    name: str = "adamw"
    matrices: frozenset[str] = frozenset()
    momentum: float = 0.95
    ema_decay: float = 0.0


@dataclass(frozen=True)
class Layout:
    """How weights lie over the processes.

    shape: of the whole weight. gather: makes the whole tensor from all parts, on every process; all must call it in
    the same order. region: the part of a whole tensor that this process holds.
    """

    shape: Callable[[str], torch.Size]
    gather: Callable[[str, torch.Tensor], torch.Tensor]
    region: Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class Update:
    """One step. lr: its learning rate. steps: (on the device) steps before it. skip: (on the device) 1.0 where
    nothing is to change, None where that was found out before."""

    lr: float
    steps: torch.Tensor
    skip: torch.Tensor | None = None


class Rule(ABC):
    """Changes some weights and keeps what it needs for that."""

    gathers = False  # whether every process must take part for each weight, however little it holds
    skips = False  # whether it heeds Update.skip, so that the host need not know

    def __init__(self, settings: OptimizerSettings, layout: Layout) -> None:
        self._settings, self._layout = settings, layout
        self.state: dict[str, dict[str, torch.Tensor]] = {}

    @abstractmethod
    def add(self, name: str, beside: Callable[..., torch.Tensor]) -> None:
        """Makes the state of one more weight. beside: makes zeros, by default of the part's shape and type fp32."""

    @abstractmethod
    def update(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], step: Update) -> None:
        """Changes parts of weights (fp32, in place) by those of their gradients."""

    def saved(self, name: str, key: str) -> torch.Tensor:
        """A part of the state as it is kept in checkpoints, fp32."""
        return self.state[name][key]

    def load(self, name: str, key: str, values: torch.Tensor) -> None:
        self.state[name][key].copy_(values)

    def vector_shape(self, name: str, key: str) -> torch.Size | None:
        """The shape of what every process holds whole; None: the state is of the weight's shape, and in parts."""
        return None


class AdamW(Rule):
    """AdamW (Loshchilov, Hutter 2019): torch's fused function over the parts."""

    skips = True

    def add(self, name: str, beside: Callable[..., torch.Tensor]) -> None:
        self.state[name] = {"exp_avg": beside(), "exp_avg_sq": beside()}

    def update(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], step: Update) -> None:
        settings = self._settings
        by_scale: dict[float, list[str]] = {}
        for name in weights:
            by_scale.setdefault(settings.lr_scales[name], []).append(name)
        for scale, names in by_scale.items():
            adamw(
                [weights[name] for name in names],
                [grads[name] for name in names],
                [self.state[name]["exp_avg"] for name in names],
                [self.state[name]["exp_avg_sq"] for name in names],
                [],
                # The function counts up what it is given, and wants a counter a weight.
                list(step.steps.expand(len(names)).clone().unbind()),
                fused=True,
                found_inf=step.skip,
                amsgrad=False,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                lr=step.lr * scale,
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                maximize=False,
            )


class AdamW8bit(Rule):
    """AdamW with both moments in 8 bits, a scale for each 256 (Dettmers et al. 2021): bitsandbytes' function.

    In checkpoints the moments are fp32; made 8 bits again they are what they were, where the parts are the same.
    """

    SMALLEST = 4096  # elements below which a weight's moments stay fp32, as in bitsandbytes' own optimizers
    _BLOCK = 256

    def __init__(self, settings: OptimizerSettings, layout: Layout) -> None:
        """Raises UserError where bitsandbytes is not installed."""
        super().__init__(settings, layout)
        functional = import_bitsandbytes("optimizer adamw8bit").functional
        self._lib: Any = functional
        self._codes = {
            "exp_avg": functional.create_dynamic_map(signed=True),
            "exp_avg_sq": functional.create_dynamic_map(signed=False),
        }
        # bitsandbytes' map ends at -0.993: a block whose largest value is negative would come back smaller.
        self._codes["exp_avg"][0] = -1.0

    def add(self, name: str, beside: Callable[..., torch.Tensor]) -> None:
        blocks = -(-beside().numel() // self._BLOCK)
        self.state[name] = {key: beside(dtype=torch.uint8) for key in self._codes}
        device = self.state[name]["exp_avg"].device
        self._codes = {key: code.to(device) for key, code in self._codes.items()}
        for key in self._codes:
            self.state[name][f"{key}.scales"] = torch.zeros(blocks, device=device)
            self.load(name, key, torch.zeros(self.state[name][key].shape, device=device))

    def update(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], step: Update) -> None:
        settings, number = self._settings, int(step.steps) + 1  # the one time that it waits
        for name, weight in weights.items():
            state = self.state[name]
            self._lib.optimizer_update_8bit_blockwise(
                "adam",
                grads[name].contiguous(),
                weight,
                state["exp_avg"],
                state["exp_avg_sq"],
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                beta3=0.0,
                alpha=0.0,
                eps=settings.eps,
                step=number,
                lr=step.lr * settings.lr_scales[name],
                qmap1=self._codes["exp_avg"],
                qmap2=self._codes["exp_avg_sq"],
                absmax1=state["exp_avg.scales"],
                absmax2=state["exp_avg_sq.scales"],
                weight_decay=settings.weight_decay,
            )

    def saved(self, name: str, key: str) -> torch.Tensor:
        state = self.state[name]
        if not state[key].numel():
            return state[key].float()
        return self._lib.dequantize_blockwise(
            state[key], absmax=state[f"{key}.scales"], code=self._codes[key], blocksize=self._BLOCK
        )

    def load(self, name: str, key: str, values: torch.Tensor) -> None:
        # To the nearest code. bitsandbytes' function searches less exactly, and would not give back what was saved.
        blocks = F.pad(values.flatten(), (0, -values.numel() % self._BLOCK)).view(-1, self._BLOCK)
        scales = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
        borders = (self._codes[key][1:] + self._codes[key][:-1]) / 2
        codes = torch.searchsorted(borders, blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        self.state[name][key].copy_(codes.flatten()[: values.numel()].view_as(values))
        self.state[name][f"{key}.scales"].copy_(scales)


class Adafactor(Rule):
    """Adafactor (Shazeer, Stern 2018), torch's function: of a matrix, means of squared gradients by row and by column.

    The learning rate is relative to the root mean square of the weight. Gradients and weights are gathered, one at a
    time.
    """

    gathers = True

    def __init__(self, settings: OptimizerSettings, layout: Layout) -> None:
        super().__init__(settings, layout)
        self._shapes: dict[str, dict[str, torch.Size]] = {}

    def add(self, name: str, beside: Callable[..., torch.Tensor]) -> None:
        shape = self._layout.shape(name)
        vectors = {"row_var": torch.Size([shape[0], 1]), "col_var": torch.Size([1, shape[1]])} if len(shape) > 1 else {}
        self._shapes[name] = vectors or {"variance": shape}
        self.state[name] = {key: beside(shape=size) for key, size in self._shapes[name].items()}

    def vector_shape(self, name: str, key: str) -> torch.Size | None:
        return self._shapes[name][key]

    def update(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], step: Update) -> None:
        for name, weight in weights.items():
            state = self.state[name]
            whole = self._layout.gather(name, weight)
            adafactor(
                [whole],
                [self._layout.gather(name, grads[name])],
                [state.get("row_var")],
                [state.get("col_var")],
                [state.get("variance")],
                [step.steps.clone()],
                foreach=False,
                d=1.0,
                lr=step.lr * self._settings.lr_scales[name],
                beta2_decay=-0.8,
                weight_decay=self._settings.weight_decay,
                eps1=None,  # type: ignore[arg-type]  # that of the weight's type
                eps2=1e-3,
                maximize=False,
            )
            weight.copy_(self._layout.region(name, whole))


class Muon(Rule):
    """Muon (Jordan et al. 2024) with updates as large as AdamW's (Liu et al. 2025: 0.2 * sqrt(max(rows, columns))), so
    that learning rate and weight decay mean the same for all weights. The update is gathered, a matrix at a time.
    """

    gathers = True
    _NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5, 1e-7  # coefficients, iterations, epsilon

    def add(self, name: str, beside: Callable[..., torch.Tensor]) -> None:
        self.state[name] = {"momentum": beside()}

    def update(self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], step: Update) -> None:
        momentum = self._settings.momentum
        for name, weight in weights.items():
            mean = self.state[name]["momentum"].lerp_(grads[name], 1 - momentum)
            whole = self._layout.gather(name, grads[name].lerp(mean, momentum))
            whole = _zeropower_via_newtonschulz(whole, *self._NEWTON_SCHULZ).contiguous()
            lr = step.lr * self._settings.lr_scales[name]
            weight.mul_(1 - lr * self._settings.weight_decay)
            weight.add_(self._layout.region(name, whole), alpha=-lr * (0.2 * max(whole.shape) ** 0.5))


def rules_for(shapes: dict[str, torch.Size], settings: OptimizerSettings, layout: Layout) -> dict[str, Rule]:
    """The rule of each weight. Raises UserError where one cannot be used here."""
    usual = AdamW(settings, layout)
    if settings.name == "adamw":
        return dict.fromkeys(shapes, usual)
    if settings.name == "adamw8bit":
        small = AdamW8bit(settings, layout)
        return {name: small if shape.numel() >= small.SMALLEST else usual for name, shape in shapes.items()}
    if settings.name == "adafactor":
        return dict.fromkeys(shapes, Adafactor(settings, layout))
    matrix = Muon(settings, layout)
    return {name: matrix if name in settings.matrices else usual for name in shapes}
