"""Estimates memory, disk space and time from a model, a job and GPUs; and searches for similar settings that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fm9g.config.model import ModelConfig
from fm9g.errors import UserError
from fm9g.hardware import GIB, GPUS, Gpu
from fm9g.model import counts
from fm9g.plan import sizes
from fm9g.plan.job import SEARCH_SPACE, JobConfig
from fm9g.plan.memory import COMPONENTS, StepPhase, peak_memory

FRAGMENTATION = 0.04  # fraction of memory lost between tensors; a cautious assumption
# For the order of suggestions alone: bytes per second from a GPU to others of its node, to other nodes and to its host;
# and weights per second that a GPU's share of the host's processors updates.
_NODE, _NETWORK, _HOST, _HOST_UPDATES = 200e9, 25e9, 20e9, 0.4e9
_SELECTIVE = 0.05  # fraction of a step that recomputes norms, rotations and activations


@dataclass(frozen=True)
class JobEstimate:
    """What a job needs.

    Args:
        memory: the phase of a step with the most GPU memory.
        checkpoint: bytes of a checkpoint on disk.
        flops_per_token: of the model, without recomputation.
        step_seconds: a rough guess, only good for comparing jobs.
    """

    model: ModelConfig
    job: JobConfig
    gpu: Gpu
    weights: int
    memory: StepPhase
    checkpoint: int
    flops_per_token: float
    mfu: float
    step_seconds: float

    @property
    def needed(self) -> float:
        """Bytes of GPU memory: tensors and overhead."""
        return self.memory.total + self.overhead

    @property
    def overhead(self) -> float:
        """Bytes of GPU memory that are not in tensors."""
        return FRAGMENTATION * self.memory.total + self.gpu.context * GIB

    @property
    def free(self) -> float:
        """Unused bytes of GPU memory; negative if the job does not fit."""
        return self.gpu.memory * GIB - self.needed

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def tokens_per_second(self) -> float:
        """At the stated MFU (Chowdhery et al. 2022, appendix B)."""
        return self.job.nodes * self.job.gpus * self.gpu.flops * self.mfu / self.flops_per_token

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 86400

    def to_json(self, tokens: float | None) -> dict[str, Any]:
        """Bytes, seconds and counts. tokens: tokens of the run; None: unknown."""
        return {
            "setup": asdict(self.job),
            "gpu": asdict(self.gpu),
            "parameters": self.weights,
            "memory": {name: round(getattr(self.memory, name)) for name in COMPONENTS},
            "peak_at": self.memory.name,
            "tensors": round(self.memory.total),
            "needed": round(self.needed),
            "free": round(self.free),
            "fits": self.fits,
            "checkpoint": self.checkpoint,
            "tokens_a_step": self.job.tokens_per_step,
            "flops_a_token": self.flops_per_token,
            "mfu": self.mfu,
            "tokens_a_second": self.tokens_per_second,
            "tokens": tokens,
            "steps": None if tokens is None else math.ceil(tokens / self.job.tokens_per_step),
            "days": None if tokens is None else self.days(tokens),
        }


def estimate_job(model: ModelConfig, job: JobConfig, gpu: Gpu = GPUS["A100"], mfu: float = 0.4) -> JobEstimate:
    """Estimates what training a model needs.

    Args:
        mfu: model FLOPs utilization: the model's FLOPs as a fraction of the peak of the GPUs.

    Raises:
        UserError: the job is impossible for this model.
    """
    job.check(model)
    return JobEstimate(
        model=model,
        job=job,
        gpu=gpu,
        weights=counts.count_weights(model),
        memory=peak_memory(model, job),
        checkpoint=sizes.checkpoint_bytes(model, job),
        flops_per_token=counts.flops_per_token(model, job.max_length, job.adapters(model)),
        mfu=mfu,
        step_seconds=_step_seconds(model, job, gpu, mfu),
    )


def _step_seconds(model: ModelConfig, job: JobConfig, gpu: Gpu, mfu: float) -> float:
    """The longer of computation and messages, a tenth of the messages, and then offloading.

    Assumes that a GPU reaches `mfu` without recomputation. Messages of ZeRO: Rajbhandari et al. 2020, section 7.
    """
    again = {"none": 0.0, "selective": _SELECTIVE, "full": 1 / 3}[job.activation_checkpoint]
    flops = job.row * counts.flops_per_token(model, job.max_length, job.adapters(model)) / job.tp_size
    computing = flops / gpu.flops / mfu * (1 + again * min(1, job.grad_ckpt_num / model.num_layers))
    num_weights, e = counts.count_weights(model) / job.tp_size, job.width
    speed = _NODE if job.nodes == 1 else _NETWORK
    reduced = e if job.engine == "bmtrain" else 4
    several = job.data_parallel > 1
    gathered = e * {0: 0, 2: 1, 3: 2}[job.zero_level]
    often, once = (gathered, 2 * reduced) if job.zero_level == 0 else (gathered + reduced, 0)
    messages = num_weights * often / speed * several
    exchanged = 4 * model.num_layers * 2 * job.row * model.hidden_size * e * (job.tp_size > 1) / _NODE
    micro_batch = max(computing, messages) + messages / 10 + exchanged
    mine = num_weights / (job.data_parallel if job.zero_level else 1)
    offloading = mine * (8 / _HOST + 1 / _HOST_UPDATES) * job.offload_optimizer
    return micro_batch * job.gradient_accumulation_steps + num_weights * once / speed * several + offloading


def suggest(
    model: ModelConfig, job: JobConfig, gpu: Gpu = GPUS["A100"], mfu: float = 0.4, count: int = 5
) -> list[tuple[str, JobEstimate]]:
    """Searches for jobs that fit, with the same number of tokens per step; returns their changes and estimates.

    The fastest by estimate come first. A job is left out if a faster one needs only some of its changes.
    """
    fitting = []
    for other in _candidates(model, job):
        estimate = estimate_job(model, other, gpu, mfu)
        if estimate.fits:
            fitting.append((frozenset(_changed_options(job, other)), estimate))
    fitting.sort(key=lambda item: (item[1].step_seconds, len(item[0])))
    chosen: list[tuple[frozenset[str], JobEstimate]] = []
    for changes, estimate in fitting:  # those chosen before are at least as fast
        if not any({_option_name(c) for c in before} <= {_option_name(c) for c in changes} for before, _ in chosen):
            chosen.append((changes, estimate))
    return [(" ".join(sorted(changes)), estimate) for changes, estimate in chosen[:count]]


def _candidates(model: ModelConfig, job: JobConfig) -> Iterator[JobConfig]:
    num_packs, layers = job.tokens_per_step // job.max_length, model.num_layers
    tp_sizes = [n for n in range(1, job.gpus + 1) if job.gpus % n == 0]
    batches = [n for n in range(1, job.batch_size + 1) if job.batch_size % n == 0]
    engines = ("bmtrain", "torch") if job.engine == "bmtrain" else ("torch",)
    choices = (
        engines,
        SEARCH_SPACE["zero_level"],
        SEARCH_SPACE["activation_checkpoint"],
        tp_sizes,
        (False, True),
        batches,
    )
    for engine, level, kind, tp, offload, batch in itertools.product(*choices):
        if tp > 1 and job.lora_layer:
            continue
        ranks = job.nodes * job.gpus // tp
        if num_packs % (batch * ranks) or (job.offload_optimizer and not offload):
            continue
        try:
            other = replace(
                job,
                engine=engine,
                zero_level=level,
                activation_checkpoint=kind,
                grad_ckpt_num=job.grad_ckpt_num
                if kind == job.activation_checkpoint
                else max(job.grad_ckpt_num, layers),
                tp_size=tp,
                offload_optimizer=offload,
                batch_size=batch,
                gradient_accumulation_steps=num_packs // (batch * ranks),
            )
            other.check(model)
        except UserError:
            continue
        yield other


def _changed_options(before: JobConfig, after: JobConfig) -> Iterator[str]:
    """`--key value` for each key that differs and has an effect."""
    for key, value in asdict(after).items():
        if value != getattr(before, key) and (key != "grad_ckpt_num" or after.activation_checkpoint != "none"):
            yield f"--{key} {str(value).lower()}"


def _option_name(change: str) -> str:
    return change.split()[0]
