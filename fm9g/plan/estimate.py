"""From a model, a setup and GPUs to memory, disk and days; and the settings near by that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fm9g.config.model import ModelConfig
from fm9g.errors import UserError
from fm9g.plan import sizes
from fm9g.plan.memory import COMPONENTS, Moment, peak
from fm9g.plan.setup import CHOICES, GIB, GPUS, Gpu, Setup

IDLE = 0.04  # of all memory, what lies between tensors; an assumption, on the careful side
# For the order of suggestions alone: bytes a second between a GPU and the others of its node, those of other nodes, and
# its host; and weights a second that a GPU's share of the host's processors updates.
_NODE, _NETWORK, _HOST, _HOST_UPDATES = 200e9, 25e9, 20e9, 0.4e9
_SELECTIVE = 0.05  # of a step: norms, rotations and activations once more


@dataclass(frozen=True)
class Plan:
    """What a setup takes. memory: the fullest moment of a GPU; bytes. flops_a_token: of the model, without what is
    computed again. step_seconds: a guess that is good for comparing setups alone."""

    model: ModelConfig
    setup: Setup
    gpu: Gpu
    weights: int
    memory: Moment
    checkpoint: int
    flops_a_token: float
    mfu: float
    step_seconds: float

    @property
    def needed(self) -> float:
        """Bytes of GPU memory, with what is no tensor."""
        return self.memory.total + self.overhead

    @property
    def overhead(self) -> float:
        """Bytes that no tensor holds."""
        return IDLE * self.memory.total + self.gpu.context * GIB

    @property
    def free(self) -> float:
        """Bytes of GPU memory that are left; negative where it does not fit."""
        return self.gpu.memory * GIB - self.needed

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def tokens_a_second(self) -> float:
        """At the stated MFU (Chowdhery et al. 2022, appendix B)."""
        return self.setup.nodes * self.setup.gpus * self.gpu.flops * self.mfu / self.flops_a_token

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_a_second / 86400

    def to_json(self, tokens: float | None) -> dict[str, Any]:
        """Bytes, seconds and counts. tokens: of the whole run; None: unknown."""
        return {
            "setup": asdict(self.setup),
            "gpu": asdict(self.gpu),
            "parameters": self.weights,
            "memory": {name: round(getattr(self.memory, name)) for name in COMPONENTS},
            "peak_at": self.memory.name,
            "tensors": round(self.memory.total),
            "needed": round(self.needed),
            "free": round(self.free),
            "fits": self.fits,
            "checkpoint": self.checkpoint,
            "tokens_a_step": self.setup.tokens_a_step,
            "flops_a_token": self.flops_a_token,
            "mfu": self.mfu,
            "tokens_a_second": self.tokens_a_second,
            "tokens": tokens,
            "steps": None if tokens is None else math.ceil(tokens / self.setup.tokens_a_step),
            "days": None if tokens is None else self.days(tokens),
        }


def plan(model: ModelConfig, setup: Setup, gpu: Gpu = GPUS["A100"], mfu: float = 0.4) -> Plan:
    """What training a model so takes. mfu: share of the GPUs' peak that the model's own FLOPs are.

    Raises UserError where the setup cannot be.
    """
    setup.check(model)
    return Plan(
        model=model,
        setup=setup,
        gpu=gpu,
        weights=sizes.count_weights(model),
        memory=peak(model, setup),
        checkpoint=sizes.checkpoint_bytes(model, setup),
        flops_a_token=sizes.flops_a_token(model, setup.max_length, setup.adapters(model)),
        mfu=mfu,
        step_seconds=_step_seconds(model, setup, gpu, mfu),
    )


def _step_seconds(model: ModelConfig, setup: Setup, gpu: Gpu, mfu: float) -> float:
    """Computation, or messages where they take longer, and a tenth of these; then what waits for both.

    Without recomputation a GPU is taken to reach `mfu`. Messages of ZeRO (Rajbhandari et al. 2020, section 7).
    """
    again = {"none": 0.0, "selective": _SELECTIVE, "full": 1 / 3}[setup.activation_checkpoint]
    flops = setup.row * sizes.flops_a_token(model, setup.max_length, setup.adapters(model)) / setup.tp_size
    computing = flops / gpu.flops / mfu * (1 + again * min(1, setup.grad_ckpt_num / model.num_layers))
    held, e = sizes.count_weights(model) / setup.tp_size, setup.width
    speed = _NODE if setup.nodes == 1 else _NETWORK
    reduced = e if setup.engine == "bmtrain" else 4
    several = setup.data_parallel > 1
    gathered = e * {0: 0, 2: 1, 3: 2}[setup.zero_level]
    often, once = (gathered, 2 * reduced) if setup.zero_level == 0 else (gathered + reduced, 0)
    messages = held * often / speed * several
    exchanged = 4 * model.num_layers * 2 * setup.row * model.hidden_size * e * (setup.tp_size > 1) / _NODE
    micro_batch = max(computing, messages) + messages / 10 + exchanged
    mine = held / (setup.data_parallel if setup.zero_level else 1)
    offloading = mine * (8 / _HOST + 1 / _HOST_UPDATES) * setup.optimizer_offload
    return micro_batch * setup.grad_accum + held * once / speed * several + offloading


def suggest(
    model: ModelConfig, setup: Setup, gpu: Gpu = GPUS["A100"], mfu: float = 0.4, count: int = 5
) -> list[tuple[str, Plan]]:
    """Setups that fit and differ from this one as little as needed, with as many tokens a step: changes and plans.

    The fastest by estimate come first. One that changes all that a faster one does, and more, is left out.
    """
    found = []
    for other in _neighbours(model, setup):
        made = plan(model, other, gpu, mfu)
        if made.fits:
            found.append((frozenset(_changes(setup, other)), made))
    found.sort(key=lambda item: (item[1].step_seconds, len(item[0])))
    kept: list[tuple[frozenset[str], Plan]] = []
    for changes, made in found:  # those kept are as fast or faster
        if not any({_key(c) for c in before} <= {_key(c) for c in changes} for before, _ in kept):
            kept.append((changes, made))
    return [(" ".join(sorted(changes)), made) for changes, made in kept[:count]]


def _neighbours(model: ModelConfig, setup: Setup) -> Iterator[Setup]:
    packs, layers = setup.tokens_a_step // setup.max_length, model.num_layers
    ways = [n for n in range(1, setup.gpus + 1) if setup.gpus % n == 0]
    batches = [n for n in range(1, setup.batch_size + 1) if setup.batch_size % n == 0]
    engines = ("bmtrain", "torch") if setup.engine == "bmtrain" else ("torch",)
    choices = (engines, CHOICES["zero_level"], CHOICES["activation_checkpoint"], ways, (False, True), batches)
    for engine, level, kind, tp, offload, batch in itertools.product(*choices):
        if tp > 1 and setup.lora_layer:
            continue
        ranks = setup.nodes * setup.gpus // tp
        if packs % (batch * ranks) or (setup.optimizer_offload and not offload):
            continue
        try:
            other = replace(
                setup,
                engine=engine,
                zero_level=level,
                activation_checkpoint=kind,
                grad_ckpt_num=setup.grad_ckpt_num
                if kind == setup.activation_checkpoint
                else max(setup.grad_ckpt_num, layers),
                tp_size=tp,
                optimizer_offload=offload,
                batch_size=batch,
                grad_accum=packs // (batch * ranks),
            )
            other.check(model)
        except UserError:
            continue
        yield other


def _changes(before: Setup, after: Setup) -> Iterator[str]:
    """`--key value` for each key that differs and means something."""
    for key, value in asdict(after).items():
        if value != getattr(before, key) and (key != "grad_ckpt_num" or after.activation_checkpoint != "none"):
            yield f"--{key} {str(value).lower()}"


def _key(change: str) -> str:
    return change.split()[0]
