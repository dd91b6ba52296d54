"""Initial values of weights for training with adapters, and what of them an adapter's file must contain."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import torch

from fm9g.config.adapter import AdapterConfig
from fm9g.errors import UserError
from fm9g.io.pt_file import Tensors
from fm9g.lora.inject import MAGNITUDE, A, B, import_peft
from fm9g.model.seeding import weight_generator


class AdapterInit:
    """Initializes the weights of a model with adapters, by their names in files, on the rank that reads weights.

    A is uniform, as kaiming_uniform with a = sqrt(5), and B zero; with DoRA the magnitude is the length of each row of
    the base. With PiSSA (Meng et al. 2024), B and A are the r largest singular vectors of the base W, and the model
    computes with the rest, W - s B A. The adapter in a file must apply to W itself, so files contain 2 r ranks:

        W + s [B | -B_0] [A  ]  =  (W - s B_0 A_0) + s B A          r: rank, s: scaling, _0: initial values
                         [A_0]
    """

    def __init__(
        self,
        config: AdapterConfig,
        layers: Collection[str],
        base: Callable[[str], torch.Tensor],
        init: str,
        seed: int,
        saved: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            layers: names of the layers with adapters.
            base: reads a weight of the base by name.
            init: pissa, or pissa_niter_16, PEFT's faster approximation.
            saved: the content of the adapter file to continue from.
        """
        self._config, self._layers, self._base, self._init = config, layers, base, init
        self._seed, self._saved = seed, saved
        self.initial_ab: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of PiSSA: layer -> A, B

    def init_weight(self, name: str, weight: torch.Tensor) -> None:
        """Writes the initial values of the named weight into a tensor."""
        layer, dot, _ = name.rpartition(".lora.")
        if not dot and self._saved is not None and name in self._saved:  # of modules_to_save
            weight.copy_(self._saved[name])
        elif not dot:
            values = self._base(name)
            if self._config.pissa and name.removesuffix(".weight") in self._layers:
                a, b = self._initial_ab(name.removesuffix(".weight"))
                values = values.float() - self._config.scaling * (b @ a)
            weight.copy_(values)
        elif self._saved is not None:
            weight.copy_(trainable_ranks(self._config, name, self._saved[name]))
        elif name.endswith(MAGNITUDE):
            row_norms = self._base(f"{layer}.weight").float().norm(dim=1)
            if not row_norms.all():
                raise UserError(
                    f"use_dora: {layer}.weight has a row of zeros, which has no direction; "
                    "remove that layer from lora_layer"
                )
            weight.copy_(row_norms)
        elif self._config.pissa:
            weight.copy_(self._initial_ab(layer)[0 if name.endswith(A) else 1])
        elif name.endswith(A):
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound, generator=weight_generator(name, self._seed, weight.device))
        else:
            weight.zero_()

    def _initial_ab(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The initial A and B of a PiSSA layer."""
        if layer not in self.initial_ab:
            if self._saved is not None:
                a, b = self._saved[layer + A].chunk(2)[1], -self._saved[layer + B].chunk(2, dim=1)[1]
                self.initial_ab[layer] = a.clone(), b
            else:
                self.initial_ab[layer] = self._pissa_ab(self._base(f"{layer}.weight"))
        return self.initial_ab[layer]

    def _pissa_ab(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The A and B that PEFT's PiSSA takes from a weight of the base."""
        rank, alpha, init = self._config.r, self._config.alpha, self._init
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        with import_peft() as peft, torch.random.fork_rng(devices=[]):
            lora_config = peft.LoraConfig(
                r=rank, lora_alpha=alpha, use_rslora=self._config.rslora, init_lora_weights=init
            )
            torch.manual_seed(self._seed)
            layer = peft.tuners.lora.Linear(linear, "default", lora_config, r=rank, lora_alpha=alpha)
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    def for_file(self, tensors: Tensors) -> Tensors:
        """The tensors of an adapter's file from those that are trained."""
        return _PissaFileView(tensors, self.initial_ab) if self._config.pissa else tensors


def trainable_ranks(config: AdapterConfig, name: str, saved: torch.Tensor) -> torch.Tensor:
    """The part of a tensor of an adapter's file that is trained: with PiSSA the first half of the ranks."""
    return saved.chunk(2, dim=0 if name.endswith(A) else 1)[0] if config.pissa and name.endswith((A, B)) else saved


class _PissaFileView:
    """Appends the initial values to tensors: A_0 below A, -B_0 to the right of B; see `AdapterInit`."""

    def __init__(self, tensors: Tensors, initial_ab: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._tensors, self._initial_ab = tensors, initial_ab
        self.meta = {
            name: torch.cat([meta, meta], dim=0 if name.endswith(A) else 1) if name.endswith((A, B)) else meta
            for name, meta in tensors.meta.items()
        }

    def stage_to_host(self, buffers: dict[str, torch.Tensor]) -> None:
        self._tensors.stage_to_host(buffers)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, now in self._tensors:
            initial_ab = self._initial_ab.get(name.rpartition(".lora.")[0])  # there on rank 0, which writes the file
            if initial_ab is not None:
                now = torch.cat([now, initial_ab[0]]) if name.endswith(A) else torch.cat([now, -initial_ab[1]], dim=1)
            yield name, now
