"""The settings of a training job that its memory and speed depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fm9g.config.model import ModelConfig
from fm9g.config.resolved import DeviceFacts, resolve
from fm9g.config.run import RunConfig
from fm9g.config.train_rules import check_model_parallelism, check_parallelism
from fm9g.errors import UserError
from fm9g.model.counts import adapter_weights, head_weights, trained_layers

SEARCH_SPACE: dict[str, tuple[Any, ...]] = {
    "engine": ("torch", "bmtrain"),
    "zero_level": (0, 2, 3),
    "activation_checkpoint": ("none", "selective", "full"),
    "half_type": ("bf16", "fp16", "fp32"),
}
# Training keys that are fields of JobConfig, too.
RUN_KEYS = (
    "zero_level",
    "tp_size",
    "sequence_parallel",
    "grad_ckpt_num",
    "offload_optimizer",
    "optimizer",
    "sgd_momentum",
    "ema_decay",
    "trainable_layers",
    "batch_size",
    "max_length",
    "lora_r",
    "quantization",
    "save_model_only",
)
# Bytes of a quantized weight in bitsandbytes: the bits and their scales (Dettmers et al. 2023, section 3).
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
PLANNED_GPUS = DeviceFacts(on_gpu=True, has_fast_bf16=True, has_bmtrain=True)


@dataclass(frozen=True)
class JobConfig:
    """The training keys that matter here, and the machines.

    Args:
        nodes: number of machines.
        gpus: GPUs (or processes) of each machine.
        half_type: precision of the computation.
        flash: attention uses the flash-attn kernel; otherwise torch copies the outputs of a row's documents once more.
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
    sgd_momentum: float = 0.0
    ema_decay: float = 0.0
    trainable_layers: int = 0
    half_type: str = "bf16"
    batch_size: int = 1
    max_length: int = 4096
    gradient_accumulation_steps: int = 1
    lora_layer: tuple[str, ...] = ()
    lora_r: int = 8
    modules_to_save: tuple[str, ...] = ()
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
        check_parallelism(self.engine, self.zero_level, self.tp_size, self.sequence_parallel, self.row)
        if self.gpus % self.tp_size:
            raise UserError(f"tp_size {self.tp_size} does not divide the {self.gpus} GPUs of a node")

    @property
    def row(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.max_length

    @property
    def data_parallel(self) -> int:
        """Number of replicas that train on different tokens, and over which ZeRO shards."""
        return self.nodes * self.gpus // self.tp_size

    @property
    def tokens_per_step(self) -> int:
        return self.row * self.gradient_accumulation_steps * self.data_parallel

    @property
    def width(self) -> int:
        """Bytes of a number in the precision of the computation."""
        return 4 if self.half_type == "fp32" else 2

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if tensor parallelism cannot divide the model."""
        check_model_parallelism(model, self.tp_size)

    def saved_modules(self, model: ModelConfig) -> int:
        """Weights outside layers that are trained beside adapters: the embedding, the output layer."""
        num_modules = min(1, len(self.modules_to_save)) if model.tie_word_embeddings else len(self.modules_to_save)
        return num_modules * head_weights(model)

    def adapters(self, model: ModelConfig) -> int:
        """Weights of a layer's adapters; 0: there are none, and all weights are trained."""
        return adapter_weights(model, self.lora_layer, self.lora_r)

    def trains(self, *names: str) -> bool:
        """Whether one of these linear layers is trained or has an adapter."""
        return not self.lora_layer or any(name.rpartition(".")[2] in names for name in self.lora_layer)

    @property
    def trains_root(self) -> bool:
        """Whether the weights outside layers are trained: embedding, last norm and output layer."""
        return not self.lora_layer and not self.trainable_layers

    def trained_layers(self, model: ModelConfig) -> range:
        """The indices of the layers that are trained, or have adapters."""
        return trained_layers(model.num_layers, self.trainable_layers)

    @property
    def split_tokens(self) -> int:
        """Number of ranks that divide the tokens of norms and residual stream."""
        return self.tp_size if self.sequence_parallel else 1

    @classmethod
    def from_run(cls, run: RunConfig, nodes: int, gpus: int, device: DeviceFacts = PLANNED_GPUS) -> JobConfig:
        """The job of a run on `nodes` machines with `gpus` devices each.

        Raises:
            UserError: the run cannot have this number of processes.
        """
        train = run.train
        if nodes < 1 or gpus < 1:
            raise UserError(f"found {nodes} nodes with {gpus} GPUs each, expected 1 or more")
        resolved = resolve(run, nodes * gpus, device)
        return cls(
            engine=resolved.engine,
            nodes=nodes,
            gpus=gpus,
            half_type=resolved.dtype,
            activation_checkpoint=train.checkpointing,
            gradient_accumulation_steps=resolved.layout.gradient_accumulation_steps,
            lora_layer=tuple(train.lora_layer),
            modules_to_save=tuple(train.modules_to_save),
            flash=run.model.use_flash_attn and train.flash != "none",
            **{key: getattr(train, key) for key in RUN_KEYS},
        )
