"""A run resolved once: the engine, the precision and the layout of its processes, on a given machine.

Training, `fm9g plan` and `fm9g doctor` use the same object. They differ in the facts about the machine: those of the
present one, or assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.config.train_rules import check_model_parallelism, check_parallelism, check_trainable_layers


@dataclass(frozen=True)
class DeviceFacts:
    """Properties of the devices that a run computes on.

    Args:
        on_gpu: GPUs; False: CPUs.
        has_fast_bf16: arithmetic in bf16 is faster than in fp32.
        has_bmtrain: the package bmtrain is installed.
    """

    on_gpu: bool
    has_fast_bf16: bool = True
    has_bmtrain: bool = True


@dataclass(frozen=True)
class ParallelLayout:
    """The processes of a run, and their share of a step.

    world_size 8, tp_size 2:    replica 0   replica 1   replica 2   replica 3     dp_size 4
                                ranks 0 1   ranks 2 3   ranks 4 5   ranks 6 7     ranks_per_replica 2
    packs_per_step 12:          3 packs     3 packs     3 packs     3 packs       gradient_accumulation_steps 3

    The ranks of a replica train on the same tokens and share the work of each layer.
    """

    world_size: int
    ranks_per_replica: int
    packs_per_step: int

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // self.ranks_per_replica

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step on each replica."""
        return self.packs_per_step // self.dp_size

    @classmethod
    def of(cls, train: TrainConfig, world_size: int) -> ParallelLayout:
        """Raises UserError if the processes or the micro-batches cannot be divided evenly."""
        return cls(world_size, train.tp_size, train.packs_per_step(train.dp_size(world_size)))


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose open choices are made.

    Args:
        engine: bmtrain or torch.
        dtype: precision of the computation: bf16, fp16 or fp32.
    """

    run: RunConfig
    engine: str
    dtype: str
    layout: ParallelLayout

    @property
    def tokens_per_step(self) -> int:
        return self.run.train.row_tokens * self.layout.packs_per_step


def resolve(run: RunConfig, world_size: int, device: DeviceFacts) -> ResolvedRun:
    """Makes the choices that the configuration leaves open.

    Raises:
        UserError: the run cannot have this number of processes, or the model cannot be divided or has too few layers.
    """
    train = run.train
    engine = resolve_engine(train, device)
    check_parallelism(engine, train.zero_level, train.tp_size, train.sequence_parallel, train.row_tokens)
    layout = ParallelLayout.of(train, world_size)
    check_model_parallelism(run.model, train.tp_size)
    check_trainable_layers(run.model, train.trainable_layers)
    return ResolvedRun(run, engine, resolve_dtype(run.model, device), layout)


def resolve_engine(train: TrainConfig, device: DeviceFacts) -> str:
    """The engine of a run: "auto" is bmtrain on GPUs if it is installed and supports the settings, else torch."""
    if train.engine != "auto":
        return train.engine
    supported = device.on_gpu and train.tp_size == 1 and train.zero_level != 0
    return "bmtrain" if supported and device.has_bmtrain else "torch"


def resolve_dtype(model: ModelConfig, device: DeviceFacts) -> str:
    """The precision of the computation: the model's, or fp32 if that is not faster on the device."""
    if model.dtype_name == "bf16":
        return "bf16" if device.has_fast_bf16 else "fp32"
    if model.dtype_name == "fp16":
        return "fp16" if device.on_gpu else "fp32"
    return "fp32"
