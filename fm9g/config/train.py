"""How a run trains: the parameters of `train_configs/*.json` and of the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from fm9g.config import foreign
from fm9g.config.fields import canonical_keys, canonical_value, keys_of, option, parse_value
from fm9g.config.load import (
    COMMAND_LINE,
    ConfigSource,
    Resolved,
    bare_name,
    build,
    find_config,
    read_object,
    require_config,
)
from fm9g.config.mixture import LOSSES, TURNS, check_template
from fm9g.errors import UserError

LAUNCH_SCRIPT = "launch script (--default.)"
# Names of the 9G guide that have no meaning any more: name -> what replaces it.
DEPRECATED_KEYS = {
    "dataloader": "indexed datasets are the only kind",
    "dataloader_num_threads": "dataloader_num_workers sets how many processes encode",
    "dataloader_prefetch": "dataloader_prefetch_factor sets how far they run ahead",
    "load_grad": "a checkpoint is taken between steps, where there are no gradients to load",
    "local": "paths are used as they are given",
    "parallel_load_datastate": "the data position is a few kilobytes, read at once",
}
# What adapters are like, where there are any.
ADAPTER_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_backend",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "quantization",
    "double_quant",
)
# The linear layers of each transformer block.
LINEAR_LAYERS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")
_ALL_LINEAR = ("all", "all-linear")  # how LLaMA-Factory and PEFT name them together


@dataclass(frozen=True)
class TrainConfig:
    """Attributes are the 9G guide's names where the guide has one."""

    FOREIGN_KEYS: ClassVar[dict[str, str]] = foreign.TRAIN

    config: str = option("", help="the model: a name in model_configs/, or a path")
    dataset_config: str = option("", help="name in dataset_configs/, or a path")
    tokenizer_path: str = option("", help="a tokenizer file, or a folder that holds one")
    model_unique: str = option("run", help="name of the run; its outputs are kept under it; default: the --config name")
    exp_group: str = option("", help="put before model_unique in the names of the TensorBoard and logs folders")
    output_dir: str = option("data", help="where checkpoints/, tensorboard/ and logs/ go", minLength=1)
    pretrained_model: str = option(
        "",
        aliases=("load",),
        help="what to start from, at step 0: a 9G .pt file, a checkpoint, or a Hugging Face folder",
    )
    strict_state_dict: bool = option(True, help="pretrained_model must hold every weight and no other")
    only_load_model: bool = option(
        True, help="of a checkpoint's pretrained_model take the weights alone; false: the optimizer's state, too"
    )
    load_dataloader_ckpt: bool = option(
        False, help="go on in the data where the checkpoint of pretrained_model stood; resume_ckpt always does"
    )
    resume_ckpt: str = option(
        "",
        aliases=("resume",),
        help="step of this run's checkpoint to go on from; auto: the newest whole one, if there is one; last: the "
        "newest whole one; best: the one of the lowest validation loss",
    )
    resume_no_optimze: bool = option(False, help="resume without the optimizer's state")

    epochs: float = option(
        0.0, help="train_iters is what it takes to see all the data so often; 0: as train_iters says", minimum=0
    )
    train_iters: int = option(10000, help="optimizer steps of the whole run", minimum=1)
    stop_iters: int = option(
        0, help="stop, with a checkpoint, at this step although train_iters is later; 0: do not", minimum=0
    )
    stop_when_end: bool = option(
        False, help="no dataset is repeated, whatever its allow_repeat: the run ends when all are used up"
    )
    early_stopping_patience: int = option(
        0,
        aliases=("early_stop",),
        help="stop when so many evaluations in a row have not lowered the best validation loss; 0: do not",
        minimum=0,
    )
    save: bool = option(True, help="write checkpoints")
    overwrite: bool = option(False, help="start anew although the run has checkpoints, and delete these")
    save_iters: int = option(500, help="steps between checkpoints; the end always saves", minimum=1)
    async_save: bool = option(
        False, help="write checkpoints from a copy in the host's memory while training goes on (12 bytes a weight)"
    )
    save_total_limit: int = option(
        0, help="checkpoints to keep: the last ones and the best by validation loss; 0: all", minimum=0
    )
    save_model_only: bool = option(False, help="checkpoints without the optimizer's state; a third of the size")
    log_iters: int = option(1, help="steps between log lines", minimum=1)
    inspect_iters: int = option(
        0, help="steps between tables and histograms of every layer's weights and gradients; 0: never", minimum=0
    )
    report_to: str = option(
        "tensorboard",
        help="where figures go beside console and metrics.jsonl: tensorboard, wandb, swanlab, several with commas, "
        "or none",
    )
    tensorboard_all_tasks: bool = option(
        False, help="report tokens and epochs of each task, too, and its last loss at steps that had none of it"
    )
    peak_tflops: float = option(
        0.0,
        help="of one device, for the MFU; 0: the data sheet's of a known GPU in bf16 or fp16, else there is no MFU",
        minimum=0,
    )
    val_dataset: str = option("", help="what to evaluate on: name in dataset_configs/, or a path; empty: nothing")
    eval_iters: int = option(500, help="steps between evaluations on val_dataset; the end always evaluates", minimum=1)
    eval_batches: int = option(0, help="rows of an evaluation, over all processes, at most; 0: all the data", minimum=0)
    max_skipped_steps: int = option(
        10,
        aliases=("max_bad_steps",),
        help="steps in a row, skipped for a loss or gradient that is not finite or for memory, after which a run ends",
        minimum=1,
    )
    ignore_cuda_oom: bool = option(
        True,
        help="skip a step that does not fit in memory if an earlier one did, on one process; false: it ends the run",
    )
    loss_spike_sigmas: float = option(
        6.0,
        aliases=("spike",),
        help="standard deviations above the last losses that mark a step's as a spike; 0: none",
        minimum=0,
    )
    seed: int = option(1234, help="of the weights, the order of samples and dropout", minimum=0, maximum=2**32 - 1)

    batch_size: int = option(1, help="a micro-batch is one row of batch_size * max_length tokens", minimum=1)
    max_length: int = option(4096, help="longest sample, in tokens", minimum=4)
    gradient_accumulation_steps: int = option(
        1, aliases=("grad_accum",), help="micro-batches per step, on each process", minimum=1
    )
    global_batch_size: int = option(
        0,
        aliases=("global_batch",),
        help="micro-batches per step over all processes, of batch_size * max_length tokens each; their number sets "
        "gradient_accumulation_steps then. 0: gradient_accumulation_steps on each",
        minimum=0,
    )
    dataloader_num_workers: int = option(
        1, help="processes that encode; 0: the training process itself", minimum=0, maximum=1024
    )
    chat_template: str = option(
        "",
        aliases=("template",),
        help="chat template of pairs and conversations, in the datasets that name none: a built-in one (docs/data.md "
        "lists them), tokenizer (its own), a file, or none. Default: pairs are as they are, conversations are written "
        "with the tokenizer's own",
    )
    chat_template_date: str = option(
        "",
        aliases=("template_date",),
        help="what templates write as today's date, YYYY-MM-DD; default: the first day of the run",
    )
    train_on: str = option(
        "assistant",
        aliases=("loss",),
        case_insensitive=True,
        help="what is learnt of a conversation: every turn of the assistant, its last one, or all of the text",
        enum=LOSSES,
    )
    turns: str = option(
        "auto",
        case_insensitive=True,
        help="texts of a conversation: auto makes as few as the template allows, several where it rewrites earlier "
        "turns; split makes one for each turn of the assistant",
        enum=TURNS,
    )
    only_run_dataloader: bool = option(
        False, help="run the data loader alone for train_iters steps and say how fast it is"
    )
    max_samples: int = option(0, help="use the first records of each dataset alone, so many; 0: all", minimum=0)
    token_cache_dir: str = option(
        "", aliases=("token_cache",), help="folder that keeps encoded datasets, for the next epoch or run; empty: none"
    )
    on_data_change: str = option(
        "refuse",
        aliases=("data_changes",),
        value_aliases={"carry": "allow"},
        help="on resume, of a change that makes other samples (tokenizer, transforms, seed, max_length, packs a step): "
        "refuse it, or allow it and continue the epochs as far as possible. Datasets may always come, go and change "
        "their share",
        enum=["refuse", "allow"],
    )
    dataloader_prefetch_factor: int = option(
        2, help="chunks of records each worker prepares ahead", minimum=1, maximum=1024
    )

    lr: float = option(1e-2, help="learning rate at the top of the schedule", minimum=0)
    lr_scheduler: str = option(
        "cosine",
        help="learning rate schedule",
        case_insensitive=True,
        enum=["cosine", "warmupstabledrop", "warmupstableexp", "linear", "constant", "noam"],
    )
    warmup_iters: float = option(20, help="steps of linear warmup from rate 0; below 1: a share of all", minimum=0)
    drop_iters: float = option(
        0.1, help="steps of the final drop (warmupstableexp: of one decay by drop_rate); below 1: a share", minimum=0
    )
    drop_begin: int = option(-1, help="step at which warmupstableexp starts to decay; -1: never", minimum=-1)
    drop_rate: float = option(0.5, help="decay of warmupstableexp every drop_iters", exclusiveMinimum=0, maximum=1)
    min_lr_ratio: float = option(
        0.1, help="where cosine, linear and warmupstabledrop end, as a share of lr", minimum=0, maximum=1
    )
    optimizer: str = option(
        "adamw",
        case_insensitive=True,
        help="adamw; adamw8bit, its moments in 8 bits; adafactor; muon, for the layers' matrices, adamw for the rest",
        enum=["adamw", "adamw8bit", "adafactor", "muon"],
    )
    weight_decay: float = option(0.1, help="decoupled weight decay, on every weight", minimum=0)
    beta1: float = option(0.9, help="AdamW's decay of the first moment", minimum=0, exclusiveMaximum=1)
    beta2: float = option(0.95, help="AdamW's decay of the second moment", minimum=0, exclusiveMaximum=1)
    eps: float = option(1e-6, help="AdamW's epsilon", exclusiveMinimum=0)
    muon_momentum: float = option(0.95, help="muon's decay of its mean of gradients", minimum=0, exclusiveMaximum=1)
    clip_grad: float = option(1.0, help="largest norm of the gradients; 0: no clipping", minimum=0)
    ema_decay: float = option(
        0.0,
        help="of a running mean of the weights, kept in checkpoints as .ema.pt; 0: none",
        minimum=0,
        exclusiveMaximum=1,
    )
    freeze: str = option(
        "", help="weights that are not trained: patterns of their names with commas, such as encoder.layers.[0-9].*"
    )
    adapter: str = option(
        "",
        help="an adapter to train on, from step 0: a checkpoint, a folder of PEFT, or of fm9g lora import or combine; "
        "layers, rank, alpha and kind are the adapter's",
    )
    lora_layer: list[str] = option(
        [],
        help="linear layers that get LoRA adapters, which alone are trained: a JSON list of names; all: every linear "
        "layer but the output; empty: no LoRA",
    )
    lora_r: int = option(8, help="rank of the adapters", minimum=1, maximum=2**16)
    lora_alpha: float = option(16.0, help="what adapters add counts alpha / r times", exclusiveMinimum=0, maximum=1e6)
    lora_dropout: float = option(0.0, help="of the adapters' inputs, in training", minimum=0, exclusiveMaximum=1)
    lora_backend: str = option(
        "peft", case_insensitive=True, help="the package that puts adapters into the model", enum=["peft", "opendelta"]
    )
    use_rslora: bool = option(False, help="rank-stabilized LoRA: alpha / sqrt(r) in place of alpha / r")
    use_dora: bool = option(False, help="DoRA: adapters turn weights, and their lengths are trained apart")
    init_lora_weights: str = option(
        "default",
        case_insensitive=True,
        help="default: B is zero; pissa: A and B are the base's largest singular vectors, which the base loses; "
        "pissa_niter_16: an approximation of them that takes less time",
        enum=["default", "pissa", "pissa_niter_16"],
    )
    loraplus_lr_ratio: float = option(
        1.0, help="LoRA+: the learning rate of B over that of A; 16 is usual", exclusiveMinimum=0
    )
    quantization: str = option(
        "none",
        case_insensitive=True,
        help="QLoRA: the frozen layers' weights in 4 or 8 bits, whole on every process",
        enum=["none", "nf4", "fp4", "int8"],
    )
    double_quant: bool = option(True, help="of nf4 and fp4: their scales are quantized, too")
    label_smoothing: float = option(
        0.0, help="share of each target that is spread over all token ids", minimum=0, exclusiveMaximum=1
    )
    z_loss: float = option(0.0, help="weight of the squared log of the softmax's denominator in the loss", minimum=0)
    neftune_alpha: float = option(
        0.0, help="noise on the embeddings in training: uniform in +-alpha / sqrt(document length * width)", minimum=0
    )

    device: str = option("auto", help="auto: a GPU where there is one", enum=["auto", "cpu", "cuda"])
    flash: str = option(
        "cuda",
        help="attention: cuda uses flash-attn, else torch's varlen kernel, else goes document by document; both "
        "kernels need bf16 or fp16 on a GPU. none always goes document by document",
        enum=["cuda", "none"],
    )
    use_checkpoint: bool = option(False, help="the guide's name of activation_checkpoint full")
    activation_checkpoint: str = option(
        "",
        case_insensitive=True,
        help="what the backward pass computes again, to save memory: full, whole layers; selective, all but matrix "
        "products and attention; none; empty: as use_checkpoint says",
        enum=["", "none", "selective", "full"],
    )
    grad_ckpt_num: int = option(160, help="with activation checkpointing: how many layers, from the first", minimum=0)

    engine: str = option(
        "auto",
        help="who shards: bmtrain, torch (FSDP2), or auto: bmtrain where GPU and package are there",
        enum=["auto", "bmtrain", "torch"],
    )
    zero_level: int = option(
        3,
        help="over the processes are sharded: 3, weights, gradients and optimizer; 2, weights stay gathered from the "
        "forward to the backward pass; 0 (engine torch), nothing: copies, as DDP has",
        enum=[0, 2, 3],
    )
    tp_size: int = option(
        1, help="processes that share each layer's work (tensor parallelism; engine torch)", minimum=1
    )
    sequence_parallel: bool = option(True, help="with tp_size: they share the tokens of the norms, too")
    offload_optimizer: bool = option(
        False,
        aliases=("optimizer_offload",),
        help="keep and run the optimizer in the host's memory, on machines with GPUs",
    )
    loss_scale: float = option(32768, help="of fp16: what losses are multiplied by at first", minimum=1)
    loss_scale_steps: int = option(1024, help="of fp16: steps without overflow after which that doubles", minimum=1)
    n_gpus: int = option(
        1, help="processes that `fm9g train` starts on each machine; --nproc wins", minimum=1, maximum=1024
    )
    timeout: float = option(
        60, help="seconds after which a process or machine that does not answer ends the run", minimum=1
    )
    step_timeout: float = option(
        1800, help="seconds after which a step counts as hanging: stacks of all processes are shown", minimum=1
    )

    @property
    def checkpointing(self) -> str:
        """What the backward pass computes again, both names considered."""
        return self.activation_checkpoint or ("full" if self.use_checkpoint else "none")

    @property
    def trackers(self) -> list[str]:
        """Where figures go beside console and metrics.jsonl."""
        return [name for name in map(str.strip, self.report_to.lower().split(",")) if name not in ("", "none")]

    @property
    def last_step(self) -> int:
        """Where this session ends."""
        return min(self.stop_iters or self.train_iters, self.train_iters)

    def dp_size(self, world_size: int) -> int:
        """Groups of processes that train on different data. Raises UserError where tp_size does not divide them."""
        if world_size % self.tp_size:
            raise UserError(f"tp_size {self.tp_size} does not divide the number of processes, {world_size}")
        return world_size // self.tp_size

    def iters_for_epochs(self, tokens: float, tokens_per_step: int) -> int:
        """The steps that `epochs` take. tokens: of one epoch."""
        return max(1, math.ceil(self.epochs * tokens / tokens_per_step))

    def packs_per_step(self, dp_size: int) -> int:
        """Micro-batches a step over all processes. Raises UserError where they cannot be dealt to the replicas."""
        packs = self.global_batch_size or self.gradient_accumulation_steps * dp_size
        if packs % dp_size:
            fits = [n for n in range(1, packs + 1) if packs % n == 0]
            raise UserError(f"global_batch_size {packs} cannot be dealt to {dp_size} processes; possible: {fits}")
        return packs

    def __post_init__(self) -> None:
        for key in ("model_unique", "exp_group"):
            name = getattr(self, key)
            if "/" in name or name in (".", "..") or (key == "model_unique" and not name):
                raise UserError(f"{key}: found {name!r}, expected a plain name: it is part of the names of folders")
        if (row := self.batch_size * self.max_length) >= 2**31:
            raise UserError(f"batch_size * max_length: {row} tokens are too many for a row")
        step = self.resume_ckpt
        is_step = step.isascii() and step.isdecimal() and len(step) < 17
        if step and step not in ("auto", "last", "best") and not is_step:
            raise UserError(f"resume_ckpt: found {step!r}, expected the number of a step, auto, last or best")
        check_template(self.chat_template)
        if self.chat_template_date and not _is_date(self.chat_template_date):
            raise UserError(
                f"chat_template_date: found {self.chat_template_date!r}, expected a date such as 2026-07-26"
            )
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise UserError("global_batch_size and gradient_accumulation_steps are both given; keep one of them")
        if self.tp_size > 1 and self.engine == "bmtrain":
            raise UserError(f"tp_size {self.tp_size} needs --engine torch; bmtrain shards by ZeRO alone")
        if self.zero_level == 0 and self.engine == "bmtrain":
            raise UserError("zero_level 0 needs --engine torch; bmtrain has 2 and 3")
        if self.tp_size > 1 and self.sequence_parallel and (row := self.batch_size * self.max_length) % self.tp_size:
            raise UserError(f"tp_size {self.tp_size} does not divide batch_size * max_length, {row}")
        if self.resume_ckpt and self.overwrite:
            raise UserError("resume_ckpt and overwrite are both given; a run goes on or starts anew")
        self._check_adapters()
        object.__setattr__(self, "lora_layer", _expand_all_linear(self.lora_layer))
        if self.early_stopping_patience and not self.val_dataset:
            raise UserError("early_stopping_patience needs a val_dataset to evaluate on")
        if self.tp_size > 1 and self.neftune_alpha:
            raise UserError("neftune_alpha does not go with tp_size: its processes would draw different noise")
        named = [name.strip() for name in self.report_to.lower().split(",")]
        if "none" in named and self.trackers:
            raise UserError(f"report_to: found {self.report_to!r}: none goes with nothing else")
        if unknown := sorted(set(self.trackers) - {"tensorboard", "wandb", "swanlab"}):
            raise UserError(f"report_to: found {unknown[0]!r}, expected tensorboard, wandb, swanlab, or none")
        if self.only_run_dataloader and self.resume_ckpt:
            raise UserError("only_run_dataloader and resume_ckpt are both given; the loader alone starts at step 0")
        if (
            0 < self.drop_iters < 1
            and self.drop_iters * self.train_iters < 1
            and self.lr_scheduler == "warmupstabledrop"
        ):
            raise UserError(f"drop_iters {self.drop_iters} of train_iters {self.train_iters} is less than one step")

    def _check_adapters(self) -> None:
        known = (*LINEAR_LAYERS, *_ALL_LINEAR)
        if unknown := [name for name in self.lora_layer if name.rpartition(".")[2] not in known]:
            here = foreign.LAYERS.get(unknown[0].rpartition(".")[2])
            raise UserError(
                f"lora_layer: {unknown[0]!r} is not the name of a linear layer"
                + (f"; it is called {here} here" if here else f"; these are: {', '.join(LINEAR_LAYERS)}")
                + ", or all for every one of them"
            )
        if not self.lora_layer and not self.adapter:
            if not self.resume_ckpt:  # a checkpoint may hold adapters
                self.reject_adapter_keys()
            return
        if not self.pretrained_model and not self.resume_ckpt and not self.adapter:
            raise UserError("lora_layer needs a pretrained_model: adapters are trained on the weights of a model")
        if not self.strict_state_dict:
            raise UserError("strict_state_dict false does not go with lora_layer: adapters need the whole base")
        if self.optimizer == "adafactor":
            raise UserError(
                "optimizer adafactor does not go with lora_layer: its steps are relative to the size of a weight, and "
                "an adapter's B begins as zero, and would stay there; use adamw8bit to save memory"
            )
        if self.freeze:
            key = "lora_layer" if self.lora_layer else "adapter"
            raise UserError(f"freeze and {key} are both given; with adapters nothing else is trained anyway")
        if self.tp_size > 1:
            raise UserError(f"tp_size {self.tp_size} does not go with lora_layer; ZeRO shards adapters and model alike")
        if not self.only_load_model or self.load_dataloader_ckpt:
            raise UserError("only_load_model false and load_dataloader_ckpt do not go with lora_layer: use resume_ckpt")
        if self.use_dora and self.init_lora_weights != "default":
            raise UserError("use_dora and init_lora_weights pissa are both given; keep one of them")
        if self.lora_backend == "opendelta" and (self.use_dora or self.quantization != "none"):
            raise UserError("lora_backend opendelta has neither use_dora nor quantization; use peft")

    def reject_adapter_keys(self) -> None:
        """Raises UserError if a key of adapters is given; for a run that trains none."""
        defaults = keys_of(TrainConfig)
        if given := [key for key in ADAPTER_KEYS if getattr(self, key) != defaults[key].default]:
            raise UserError(f"{given[0]} is given and lora_layer is not: there are no adapters for it to act on")


def _expand_all_linear(layers: list[str]) -> list[str]:
    return list(LINEAR_LAYERS) if set(layers) & set(_ALL_LINEAR) else layers


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def load_train_config(
    name: str, overrides: dict[str, Any], defaults: dict[str, Any] | None = None
) -> tuple[Resolved[TrainConfig], Path]:
    """The configuration of a run: defaults < `--default.KEY` < train_configs/NAME.json < `--KEY`.

    name: of a file in train_configs/ or, where there is none, of a model in model_configs/.
    overrides, defaults: `--key value` and `--default.key value` from the command line, as strings.
    Returns the configuration and the path of its model configuration. Raises UserError.
    """
    bare = bare_name(name)
    if not bare:
        raise UserError(f"--config: found {name!r}, expected a name in train_configs/ or model_configs/, or a file")
    if "config" in (defaults or {}):
        raise UserError("--default.config: give it as --config")
    notes: list[str] = []
    file = find_config("train_configs", name)
    sections: list[ConfigSource] = []
    if file is not None and "vocab_size" not in (content := read_object(file)):
        sections = _sections(file, content)
        # A training file that names no model means the one of its own name, "7b_lora" also the one of "7b".
        known = find_config("model_configs", bare) or not bare.endswith("_lora")
        name = bare if known else bare.removesuffix("_lora")
    sources = [
        ConfigSource(COMMAND_LINE, {"config": name, "model_unique": bare}),
        ConfigSource(LAUNCH_SCRIPT, defaults or {}, text=True),
        *sections,
        ConfigSource(COMMAND_LINE, overrides, text=True),
    ]
    sources = [ConfigSource(source.origin, _without_deprecated(source, notes), source.text) for source in sources]
    resolved = build(TrainConfig, sources)
    from_file = {key: value for key, value in sources[1].values.items() if resolved.origins[key] == str(file)}
    if lost := _overridden(resolved.value, from_file):
        notes.append(f"{file} wins over the launch script: {', '.join(lost)}")
    return replace(resolved, notes=tuple(notes)), require_config("model_configs", resolved.value.config)


def _overridden(config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """The given keys whose values are not those of the configuration, with both."""
    found = []
    for key, value in given.items():
        field = keys_of(TrainConfig)[key]
        mine = getattr(config, field.name)
        read = parse_value(canonical_value(field, value), field)
        if (_expand_all_linear(read) if key == "lora_layer" and isinstance(read, list) else read) != mine:
            found.append(f"{key} is {mine!r}, not {value!r}")
    return found


def load_adapter_keys(file: Path) -> TrainConfig:
    """What a file of train_configs/ says of adapters; all other keys have their defaults. Raises UserError."""
    values = {"pretrained_model": str(file)}
    for source in _sections(file, read_object(file)):
        values |= {key: value for key, value in source.values.items() if key in ("lora_layer", *ADAPTER_KEYS)}
    return build(TrainConfig, [ConfigSource(str(file), values, text=True)]).value


def _sections(file: Path, content: dict[str, Any]) -> list[ConfigSource]:
    """The sections of a training file: "pretrain" and, for LoRA, "finetune", which wins."""
    for name, values in content.items():
        if name not in ("pretrain", "finetune") or not isinstance(values, dict):
            raise UserError(
                f'{file}: {name}: expected "pretrain" or "finetune", such as {{"pretrain": {{"lr": 1e-5}}}}'
            )
    if not content:
        raise UserError(f'{file}: is empty; expected {{"pretrain": {{...}}}}')
    return [ConfigSource(str(file), content[name], text=True) for name in ("pretrain", "finetune") if name in content]


def _without_deprecated(source: ConfigSource, notes: list[str]) -> dict[str, Any]:
    """The source's values, under their keys' own names, without those that change nothing; a note for each of these."""
    values = canonical_keys(TrainConfig, source.values, source.origin)
    for key in sorted(DEPRECATED_KEYS.keys() & values.keys()):
        notes.append(f"{source.origin}: {key} changes nothing: {DEPRECATED_KEYS[key]}")
        del values[key]
    return values
