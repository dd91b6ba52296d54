"""What a trainer needs from a sharding engine, and what all engines have in common.

An engine takes a plain model from the meta device, decides where its weights live, and does with them what involves
other processes. It knows nothing of data, files or schedules.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fm9g.engine.collect import Collected, Held
from fm9g.engine.optimizer import Optimizer, saved_keys
from fm9g.engine.processes import Processes
from fm9g.engine.recompute import recompute
from fm9g.engine.rules import Layout, OptimizerSettings
from fm9g.engine.statistics import Statistics, statistics
from fm9g.engine.stopwatch import Stopwatch
from fm9g.errors import UserError
from fm9g.memory import is_out_of_memory

Fill = Callable[[str, torch.Tensor], None]


@runtime_checkable
class Keeps(Protocol):
    """A module whose weight is no parameter: every process hands it the whole values, fp32, once."""

    wanted_shape: torch.Size

    def keep(self, weight: torch.Tensor, dtype: torch.dtype) -> None: ...


@dataclass(frozen=True)
class Placement:
    """How an engine places a model.

    dtype: of the computation; every weight has an fp32 copy. narrow_frozen: weights that are not trained have none.
    zero_level: 3, weights are gathered layer by layer, again
    in the backward pass; 2, they stay gathered in between; 0, every process holds all. checkpointing: none, selective
    or full, for as many of the first layers. tp_size: processes that share the work of each layer; sequence_parallel:
    and that of the norms. offload: the optimizer works in the host's memory.
    """

    dtype: torch.dtype = torch.float32
    zero_level: int = 3
    checkpointing: str = "none"
    checkpointed_layers: int = 0
    tp_size: int = 1
    sequence_parallel: bool = True
    offload: bool = False
    narrow_frozen: bool = False


@dataclass(frozen=True)
class Part:
    """What this process holds of a weight.

    shape: of the whole weight. region: the view of a whole tensor that is this part. copies: processes that hold the
    same part; owner: this is the one of them that speaks for it. tensor, grad: the part itself and its gradient.
    """

    shape: torch.Size
    region: Callable[[torch.Tensor], torch.Tensor]
    copies: int
    owner: bool
    trainable: bool
    tensor: Callable[[], torch.Tensor]
    grad: Callable[[], torch.Tensor | None]

    def held(self, local: torch.Tensor | None = None) -> Held:
        """The part as it is to be collected. local: in place of its own tensor."""
        return Held(self.shape, self.region, self.owner, self.tensor if local is None else lambda: local)


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018): halved when a gradient overflows, doubled after `steps` without.

    scale: 1 and steps: 0 where there is none.
    """

    scale: float = 1.0
    steps: int = 0
    good: int = 0

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good == self.steps:
            self.scale, self.good = self.scale * 2, 0


class Engine(ABC):
    """One process's part of a training run.

    replica, replicas: its place among the processes that train on different data.
    """

    def __init__(self, processes: Processes, seed: int) -> None:
        """seed: of dropout."""
        self.processes, self.device, self._seed = processes, processes.device, seed
        self.replica, self.replicas = processes.rank, processes.world_size
        self._parts: dict[str, Part] = {}
        self.messages = Stopwatch(self.device)  # of this process's messages to others, as far as they are seen

    def prepare(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        fill: Fill,
        optimizer: OptimizerSettings,
        placement: Placement,
        loss_scale: LossScale,
        names: Callable[[str], str] = str,
    ) -> None:
        """Places a model that was built on the meta device and makes its optimizer.

        layers: the modules that are gathered and checkpointed one at a time. fill: writes the values of the weight of
        that name into a tensor; it is asked on rank 0 alone, for one weight at a time. Weights that require no
        gradient stay as they are. names: makes the name by which a weight is known outside of that in the model.
        Raises UserError where the model does not fit in memory or cannot be placed so.
        """
        self.loss_scale, self._placement, self._names = loss_scale, placement, names
        for layer in list(layers)[: placement.checkpointed_layers]:
            recompute(layer, placement.checkpointing)
        try:
            for path, module in model.named_modules():
                if isinstance(module, Keeps):
                    whole = self._spread(module.wanted_shape, functools.partial(fill, names(f"{path}.weight")))
                    module.keep(whole, placement.dtype)
            self._model = self._place(model.train(), layers, fill, placement)
            self._parts = self._find_parts()
            trained = {name: part.tensor() for name, part in self._parts.items() if part.trainable}
            layout = Layout(lambda name: self._parts[name].shape, self._gather, self._region)
            self._optimizer = Optimizer(trained, optimizer, layout, placement.offload)
            for name, master in self._optimizer.masters.items():
                part = self._parts[name]
                if trained[name].dtype != torch.float32:  # what was lost by narrowing is asked for again
                    master.copy_(part.region(self._spread(part.shape, functools.partial(fill, name))))
                    if name in self._optimizer.means:
                        self._optimizer.means[name].copy_(master)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the model does not fit in the memory of {self.device} ({error}); `fm9g plan` tells what it takes"
            ) from None

    def _named(self, model: torch.nn.Module) -> list[tuple[str, Any]]:
        """The parameters of a model with the names by which they are known outside."""
        return [(self._names(name), weight) for name, weight in model.named_parameters()]

    @abstractmethod
    def _place(
        self, model: torch.nn.Module, layers: torch.nn.ModuleList, fill: Fill, placement: Placement
    ) -> torch.nn.Module:
        """The model with its weights where they belong, filled."""

    @abstractmethod
    def _find_parts(self) -> dict[str, Part]:
        """The parts of all weights by full name, in the same order on every rank."""

    def forward(self, batch: Any, draw: int) -> Any:
        """The model's result for a batch, to be handed to backward. draw: of dropout's generator, a number that is this
        batch's alone in the run."""
        torch.manual_seed((self._seed << 31) + draw)
        return self._model(batch)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradients of a loss, which is already divided by what the whole step is divided by.

        last: no other batch follows in this step.
        """
        (loss * self.loss_scale.scale).backward()

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Any:
        """The model's result for a batch, without dropout and without what a backward pass needs."""
        self._model.eval()
        try:
            return self._model(batch)
        finally:
            self._model.train()

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        """Clips the summed gradients to max_norm (0: not), updates the weights, clears the gradients.

        Returns the norm before clipping, over all ranks, still on the device. A norm that is not finite changes
        nothing, neither weights nor the optimizer's state; with loss scaling it changes the scale. With AdamW the
        device alone knows: the host does not wait for it.
        """
        grads = self._grads()
        norm = self._norm(grads) / self.loss_scale.scale
        factor = torch.ones_like(norm) / self.loss_scale.scale
        if max_norm:
            factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        look = bool(self.loss_scale.steps) or not self._optimizer.skips
        finite = bool(norm.isfinite()) if look else True
        if finite:
            weights = {name: self._parts[name].tensor() for name in grads}
            skip = None if look else 1.0 - norm.isfinite().float()
            self._optimizer.step(weights, grads, lr, factor, skip)
        if self.loss_scale.steps:
            self.loss_scale.update(finite)
        self.clear_gradients()
        return norm

    def _grads(self) -> dict[str, torch.Tensor]:
        """The gradients of trained weights, in the same order on every rank."""
        grads = {}
        for name, part in self._parts.items():
            grad = part.grad() if part.trainable else None
            if grad is None and part.trainable and not part.tensor().numel():
                grad = part.tensor()  # nothing of it is here, but others may wait for this process
            if grad is not None:
                grads[name] = grad
        return grads

    def clear_gradients(self) -> None:
        """Forgets the gradients that were added up."""
        self._model.zero_grad(set_to_none=True)

    def _norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """The norm of all gradients: each part counts once, however many processes hold it."""
        total = torch.zeros((), device=self.device)
        by_copies: dict[int, list[torch.Tensor]] = {}
        for name, grad in grads.items():
            if grad.numel():
                by_copies.setdefault(self._parts[name].copies, []).append(grad)
        for copies, held in by_copies.items():
            norms = torch._foreach_norm(held, 2, dtype=torch.float32)
            total = total + torch.stack(norms).square().sum() / copies
        with self.messages:
            return self._add_up(total).sqrt()

    def inspect(self) -> dict[str, tuple[Statistics, Statistics]]:
        """What the trained weights and the gradients of the step so far are like, by name. It waits for the device."""
        grads = self._grads()
        copies = [self._parts[name].copies for name in grads]
        weights = [functools.partial(self._wide, name) for name in grads]
        unscaled = [functools.partial(torch.div, grad, self.loss_scale.scale) for grad in grads.values()]
        tensors = list(zip([*weights, *unscaled], copies * 2))
        found = statistics(tensors, self._add_up, self.processes.gather, self.device)
        return dict(zip(grads, zip(found[: len(grads)], found[len(grads) :])))

    def _wide(self, name: str) -> torch.Tensor:
        """This process's part of a weight on the device, fp32 where it is kept so."""
        part = self._optimizer.masters.get(name)
        return self._parts[name].tensor() if part is None else part.to(self.device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all replicas."""
        return self._add_up(values.clone()) * self.replicas / self.processes.world_size

    @abstractmethod
    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor, which becomes the elementwise sum over all processes."""

    def weights(self, trained: bool = False) -> Collected:
        """Every weight by its full name, fp32, whole on rank 0's host. trained: those that are trained alone."""
        masters = self._optimizer.masters
        parts = {name: part for name, part in self._parts.items() if part.trainable or not trained}
        return self._collected({name: part.held(masters.get(name)) for name, part in parts.items()})

    def mean_weights(self, trained: bool = False) -> Collected:
        """As `weights`, the running means in place of weights that are trained; nothing where none are kept."""
        means, masters = self._optimizer.means, self._optimizer.masters
        parts = {name: part for name, part in self._parts.items() if means and (part.trainable or not trained)}
        held = {name: part.held(means.get(name, masters.get(name))) for name, part in parts.items()}
        return self._collected(held)

    def optimizer_state(self) -> Collected:
        """The optimizer's state by full weight name, fp32, as `weights` gives weights: NAME.exp_avg, NAME.exp_avg_sq,
        or what else the optimizer keeps; and under "numbers" the steps made, the loss scale and good steps since."""
        first = self.processes.rank == 0
        held = {"numbers": Held(torch.Size([3]), _same, first, self._numbers)}
        for name, key in self._saved():
            part, rule = self._parts[name], self._optimizer.rules[name]
            tensor = functools.partial(rule.saved, name, key)
            vector = rule.vector_shape(name, key)
            whole = Held(vector, _same, first, tensor) if vector is not None else None
            held[f"{name}.{key}"] = whole or Held(part.shape, part.region, part.owner, tensor)
        return self._collected(held)

    def load_optimizer_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Restores what optimizer_state gave, in any number of processes. saved: on rank 0; the others' may be empty.

        Raises UserError where the names or shapes do not match.
        """
        wanted = self.optimizer_state().like
        if self.processes.rank == 0:
            if odd := sorted(saved.keys() ^ wanted.keys()):
                raise UserError(
                    f"the optimizer's state is of another optimizer, or of other weights: {', '.join(odd[:5])}. "
                    "--resume_no_optimze true goes on without it, or of a pretrained_model --only_load_model true"
                )
            if odd := [name for name, like in wanted.items() if saved[name].shape != like.shape]:
                raise UserError(f"the optimizer's state of {odd[0]} has another shape than the model's weight")
        numbers = self._spread(torch.Size([3]), saved.get("numbers"))
        self._optimizer.steps.copy_(numbers[0])
        _, scale, good = numbers.tolist()
        self.loss_scale.good = int(good)
        if self.loss_scale.steps:
            self.loss_scale.scale = scale
        for name, key in self._saved():
            part, rule = self._parts[name], self._optimizer.rules[name]
            vector = rule.vector_shape(name, key)
            whole = self._spread(part.shape if vector is None else vector, saved.get(f"{name}.{key}"))
            rule.load(name, key, part.region(whole) if vector is None else whole)

    def load_mean_weights(self, saved: dict[str, torch.Tensor]) -> None:
        """Restores what mean_weights gave. saved: as for load_optimizer_state."""
        for name, mean in self._optimizer.means.items():
            part = self._parts[name]
            mean.copy_(part.region(self._spread(part.shape, saved.get(name))))

    def _numbers(self) -> torch.Tensor:
        return torch.tensor([float(self._optimizer.steps), self.loss_scale.scale, self.loss_scale.good])

    def _saved(self) -> list[tuple[str, str]]:
        """The keys of the optimizer's state, each with the name of its weight."""
        rules = self._optimizer.rules
        return [(name, key) for name, rule in rules.items() for key in saved_keys(rule, name)]

    def _collected(self, held: dict[str, Held]) -> Collected:
        return Collected(held, self.device, self.processes.world_size, self.processes.beside)

    def _gather(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor, fp32, on the device of every process, from the parts of all."""
        part = self._parts[name]
        whole = torch.zeros(part.shape, device=self.device)
        if part.owner:
            part.region(whole).copy_(local)
        return self._add_up(whole)

    def _region(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return self._parts[name].region(whole)

    def _spread(self, shape: torch.Size, content: torch.Tensor | Callable[[torch.Tensor], None] | None) -> torch.Tensor:
        """A whole tensor on the device of every process. content: on rank 0, its values or what writes them."""
        whole = torch.empty(shape, device=self.device)
        if self.processes.rank == 0:
            assert content is not None
            content(whole) if callable(content) else whole.copy_(content)
        return self._broadcast(whole)

    @abstractmethod
    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor, which becomes rank 0's on every process."""


def _same(whole: torch.Tensor) -> torch.Tensor:
    return whole
