"""How a model is trained, as far as memory and speed depend on it, and the GPUs there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.errors import UserError

GIB = 2**30
SEARCH_SPACE: dict[str, tuple[Any, ...]] = {
    "engine": ("torch", "bmtrain"),
    "zero_level": (0, 2, 3),
    "activation_checkpoint": ("none", "selective", "full"),
    "half_type": ("bf16", "fp16", "fp32"),
}
# Keys of a training configuration that a JobConfig has by the same name.
RUN_KEYS = (
    "engine",
    "zero_level",
    "tp_size",
    "sequence_parallel",
    "activation_checkpoint",
    "grad_ckpt_num",
    "offload_optimizer",
    "optimizer",
    "ema_decay",
    "batch_size",
    "max_length",
    "gradient_accumulation_steps",
    "lora_r",
    "quantization",
    "save_model_only",
)
# Bytes that bitsandbytes keeps for a weight: the bits, and their scales (Dettmers et al. 2023, section 3).
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Gpu:
    """memory: GiB. flops: peak of dense bf16 (fp16 where there is no bf16) per second, of the maker's data sheet.
    context: GiB that a process needs beside tensors; of a GPU, for CUDA and NCCL, assumed on the careful side."""

    memory: float
    flops: float
    context: float = 2.0


GPUS = {
    "V100": Gpu(32, 125e12),
    "A100": Gpu(80, 312e12),
    "A100-40": Gpu(40, 312e12),
    "A800": Gpu(80, 312e12),
    "L40S": Gpu(48, 362e12),
    "4090": Gpu(24, 165e12),
    "H20": Gpu(96, 148e12),
    "H100": Gpu(80, 989e12),
    "H800": Gpu(80, 989e12),
    "H200": Gpu(140, 989e12),
    "B200": Gpu(179, 2250e12),
    "910B": Gpu(64, 376e12),
}


@dataclass(frozen=True)
class JobConfig:
    """The keys of a training configuration that matter here, and the machines.

    nodes, gpus: machines, and GPUs (or processes) of each. flash: attention by the flash-attn kernel; without it torch
    copies the outputs of a row's documents once more.
    """

    engine: str = "torch"
    nodes: int = 1
    gpus: int = 1
    zero_level: int = 3
    tp_size: int = 1
    sequence_parallel: bool = True
    activation_checkpoint: str = "none"
    grad_ckpt_num: int = 160
    offload_optimizer: bool = False
    optimizer: str = "adamw"
    ema_decay: float = 0.0
    half_type: str = "bf16"
    batch_size: int = 1
    max_length: int = 4096
    gradient_accumulation_steps: int = 1
    lora_layer: tuple[str, ...] = ()
    lora_r: int = 8
    quantization: str = "none"
    save_model_only: bool = False
    flash: bool = True

    def __post_init__(self) -> None:
        for key, allowed in SEARCH_SPACE.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"{key}: found {getattr(self, key)!r}, allowed: {', '.join(map(str, allowed))}")
        for key in ("nodes", "gpus", "tp_size", "batch_size", "max_length", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}: found {getattr(self, key)}, expected 1 or more")
        if self.engine == "bmtrain" and self.tp_size > 1:
            raise UserError("tp_size: the bmtrain engine has no tensor parallelism; use --engine torch")
        if self.engine == "bmtrain" and self.zero_level == 0:
            raise UserError("zero_level: the bmtrain engine has 2 and 3")
        if self.gpus % self.tp_size:
            raise UserError(f"tp_size {self.tp_size} does not divide the {self.gpus} GPUs of a node")
        if self.sequence_parallel and self.row % self.tp_size:
            raise UserError(f"sequence_parallel: tp_size {self.tp_size} does not divide a row of {self.row} tokens")

    @property
    def row(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.max_length

    @property
    def data_parallel(self) -> int:
        """Ranks that hold different tokens, and over which ZeRO shards."""
        return self.nodes * self.gpus // self.tp_size

    @property
    def tokens_per_step(self) -> int:
        return self.row * self.gradient_accumulation_steps * self.data_parallel

    @property
    def width(self) -> int:
        """Bytes of a number in the computation."""
        return 4 if self.half_type == "fp32" else 2

    def check(self, model: ModelConfig) -> None:
        """Raises UserError where the model's heads cannot be dealt out to tp_size ranks."""
        if self.tp_size > 1 and model.qk_norm:
            raise UserError(f"tp_size {self.tp_size} does not go with a model whose qk_norm is true")
        for key in ("num_heads", "num_kv_heads"):
            if getattr(model, key) % self.tp_size:
                raise UserError(f"tp_size {self.tp_size} does not divide {key} {getattr(model, key)}")

    def adapters(self, model: ModelConfig) -> int:
        """Weights of a layer's adapters; 0: there are none, and all weights are trained."""
        from fm9g.plan.sizes import adapter_weights

        return adapter_weights(model, self.lora_layer, self.lora_r)

    def trains(self, *names: str) -> bool:
        """Whether one of these linear layers is trained, or has an adapter."""
        return not self.lora_layer or any(name.rpartition(".")[2] in names for name in self.lora_layer)

    @property
    def split_tokens(self) -> int:
        """Ranks that share the tokens of norms and residual stream."""
        return self.tp_size if self.sequence_parallel else 1

    @classmethod
    def from_run(cls, run: RunConfig, nodes: int, gpus: int, auto: str = "bmtrain") -> JobConfig:
        """Of a run's configuration on `nodes` machines with `gpus` GPUs each. auto: what the engine `auto` is there."""
        train, model = run.train.value, run.model.value
        values = {key: getattr(train, key) for key in RUN_KEYS}
        values["lora_layer"] = tuple(train.lora_layer)
        values["activation_checkpoint"] = train.checkpointing
        if train.engine == "auto":
            values["engine"] = "torch" if train.tp_size > 1 or train.zero_level == 0 else auto
        flash = model.use_flash_attn and train.flash != "none"
        job = cls(nodes=nodes, gpus=gpus, half_type=model.dtype_name, flash=flash, **values)
        packs = train.packs_per_step(job.data_parallel)
        return replace(job, gradient_accumulation_steps=packs // job.data_parallel)
