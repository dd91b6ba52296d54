"""How a run trains: the keys of `train_configs/*.json` and of `fm9g train --KEY VALUE`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fm9g.config import foreign
from fm9g.config import train_rules as rules
from fm9g.config.fields import option
from fm9g.config.mixture import LOSS_MODES, OVERSIZE_RULES, TURNS
from fm9g.errors import UserError
from fm9g.run_files import RunFolders

METHODS = ["", "full", "lora", "qlora", "freeze"]
# Keys of the 9G guide that are accepted and ignored: key -> the reason.
DEPRECATED_KEYS = {
    "dataloader": "indexed datasets are the only kind",
    "dataloader_num_threads": "dataloader_num_workers sets the number of encoding processes",
    "dataloader_prefetch": "dataloader_prefetch_factor sets how far the workers read ahead",
    "load_grad": "checkpoints are written between steps, when there are no gradients to load",
    "local": "paths are used as they are given",
    "parallel_load_datastate": "the data position takes a few kilobytes and is read at once",
}


@dataclass(frozen=True)
class TrainConfig:
    """Attributes are the 9G guide's names where the guide has one."""

    FOREIGN_KEYS: ClassVar[Callable[[], dict[str, str]]] = staticmethod(foreign.train_hints)

    config: str = option(
        "", help="the model to train: a name in model_configs/ or train_configs/, or the path of such a file"
    )
    model: str = option(
        "",
        help="the model to train, in place of config, pretrained_model and tokenizer_path: a Hugging Face folder, a 9G "
        ".pt file, a checkpoint or an adapter of fm9g, the name of a file in model_configs/, or a hub name "
        "(org/name, ms://org/name)",
    )
    data: str = option(
        "",
        help="the data to train on, in place of dataset_config: files, folders, globs, indexed datasets, mixtures and "
        "names in a dataset_info.json, several with commas; NAME#500 takes a sample, NAME:0.3 gives a share",
    )
    val_data: str = option("", help="the data to evaluate on, as for data; in place of val_dataset")
    val_split: float = option(
        0.0, help="share of the records of data that are evaluated on instead; 0: none", minimum=0, exclusiveMaximum=1
    )
    split_seed: int = option(
        42, help="random seed of val_split, train_sample and val_sample", minimum=0, maximum=2**32 - 1
    )
    train_sample: int = option(0, help="number of records, drawn at random, to train on; 0: all of data", minimum=0)
    val_sample: int = option(0, help="number of records, drawn at random, to evaluate on; 0: all", minimum=0)
    data_cache_dir: str = option(
        "", help="folder that stores the indexed files of data; empty: fm9g/data in the user's cache folder"
    )
    method: str = option(
        "",
        case_insensitive=True,
        help="what is trained, with defaults for it: full, all weights; lora, adapters; qlora, adapters on a model in "
        "4 bits; freeze, the last trainable_layers layers; empty: as the other keys say, full with model",
        enum=METHODS,
    )
    dataset_config: str = option(
        "", help="the datasets to train on: a name in dataset_configs/, or the path of such a file"
    )
    tokenizer_path: str = option("", help="the tokenizer: a tokenizer file, or a folder that contains one")
    model_unique: str = option(
        "run",
        help="name of the run; its checkpoints and logs are in folders of this name; default: the name given "
        "as --config",
    )
    exp_group: str = option(
        "", help="prefix of model_unique in the names of the TensorBoard and log folders; empty: no prefix"
    )
    output_dir: str = option("data", help="folder that receives checkpoints/, tensorboard/ and logs/", minLength=1)
    pretrained_model: str = option(
        "",
        aliases=("load",),
        help="weights to start from at step 0: a 9G .pt file, a checkpoint, or a Hugging Face folder; empty: "
        "random weights",
    )
    strict_state_dict: bool = option(
        True, help="require pretrained_model to contain every weight of the model and no other"
    )
    only_load_model: bool = option(
        True,
        help="if pretrained_model is a checkpoint, load its weights alone; false: load its optimizer state as well",
    )
    load_dataloader_ckpt: bool = option(
        False,
        help="start in the data where the checkpoint given as pretrained_model stopped; false: at the "
        "beginning; resume_ckpt always continues",
    )
    resume_ckpt: str = option(
        "",
        aliases=("resume",),
        help="checkpoint of this run to resume from: the number of its step; auto: the newest complete one, or "
        "step 0 if there is none; last: the newest complete one; best: the one with the lowest validation "
        "loss; empty: do not resume",
    )
    resume_no_optimze: bool = option(False, help="resume without the saved optimizer state: the optimizer starts again")

    epochs: float = option(
        0.0, help="number of passes over all data; sets train_iters; 0: train_iters counts", minimum=0
    )
    train_iters: int = option(10000, help="length of the whole run in optimizer steps", minimum=1)
    stop_iters: int = option(
        0,
        help="step after which this launch saves a checkpoint and stops, before train_iters; 0: train_iters",
        minimum=0,
    )
    stop_when_end: bool = option(
        False, help="end the run when every dataset is used up: none is repeated, whatever its allow_repeat"
    )
    early_stopping_patience: int = option(
        0,
        aliases=("early_stop",),
        help="number of evaluations in a row without a lower validation loss after which the run stops; 0: never",
        minimum=0,
    )
    save: bool = option(True, help="write checkpoints")
    overwrite: bool = option(
        False,
        help="start again at step 0 although the run has checkpoints, which are deleted when the first new one "
        "is saved",
    )
    save_iters: int | float = option(
        500,
        help="steps between two checkpoints; below 1: a fraction of train_iters; the last step is always saved",
        exclusiveMinimum=0,
    )
    async_save: bool = option(
        False,
        help="write checkpoints in the background, from a copy in host memory (12 bytes per weight), while "
        "training continues",
    )
    save_total_limit: int = option(
        0,
        help="number of checkpoints to keep: the newest ones and the one with the lowest validation loss; 0: all",
        minimum=0,
    )
    save_model_only: bool = option(False, help="save checkpoints without the optimizer state, at a third of the size")
    log_iters: int | float = option(
        1, help="steps between two log lines; below 1: a fraction of train_iters", exclusiveMinimum=0
    )
    inspect_iters: int = option(
        0,
        help="steps between two tables and histograms of the weights and gradients of every layer; 0: never",
        minimum=0,
    )
    report_to: str = option(
        "tensorboard",
        help="metric trackers in addition to the console and metrics.jsonl: tensorboard, wandb, swanlab, "
        "several with commas, or none",
    )
    tensorboard_all_tasks: bool = option(
        False,
        help="also report tokens and epochs of each task, and repeat the last loss of a task at steps without its data",
    )
    peak_tflops: float = option(
        0.0,
        help="peak speed of one device in TFLOPS (10^12 operations per second), from which the MFU is "
        "computed; 0: the data sheet's value for a known GPU in bf16 or fp16, no MFU for others",
        minimum=0,
    )
    val_dataset: str = option(
        "", help="datasets to evaluate on: a name in dataset_configs/, or the path of such a file; empty: no evaluation"
    )
    eval_iters: int | float = option(
        500,
        help="steps between two evaluations; below 1: a fraction of train_iters; the last step is always evaluated",
        exclusiveMinimum=0,
    )
    eval_batches: int = option(
        0, help="maximum number of rows of an evaluation, over all processes; 0: all the data", minimum=0
    )
    max_skipped_steps: int = option(
        10,
        aliases=("max_bad_steps",),
        help="number of steps in a row that may be skipped, for a loss or gradient that is not finite or for "
        "lack of memory, before the run ends",
        minimum=1,
    )
    ignore_cuda_oom: bool = option(
        True,
        help="in a run of one process, skip a step that runs out of memory if an earlier step did fit; false: "
        "end the run",
    )
    loss_spike_sigmas: float = option(
        6.0,
        aliases=("spike",),
        help="report a step as a loss spike if its loss is this number of standard deviations above the last "
        "losses; 0: never",
        minimum=0,
    )
    seed: int = option(
        1234, help="random seed of the initial weights, the order of samples and dropout", minimum=0, maximum=2**32 - 1
    )

    batch_size: int = option(
        1, help="a micro-batch is one row of batch_size * max_length tokens, into which samples are packed", minimum=1
    )
    max_length: int = option(4096, help="maximum length of a sample in tokens", minimum=4)
    gradient_accumulation_steps: int = option(
        1, aliases=("grad_accum",), help="micro-batches per step on each data-parallel replica", minimum=1
    )
    global_batch_size: int = option(
        0,
        aliases=("global_batch",),
        help="micro-batches per step over all replicas, of batch_size * max_length tokens each; sets "
        "gradient_accumulation_steps; 0: gradient_accumulation_steps counts",
        minimum=0,
    )
    packing: bool = option(
        True,
        help="fill each micro-batch with as many samples as fit; false: it has batch_size samples, and an epoch ends "
        "with a step, as in the Trainer of transformers",
    )
    eval_batch_size: int = option(0, help="batch_size of evaluations, which need less memory; 0: batch_size", minimum=0)
    test_oom_error: bool = option(
        False,
        help="instead of training, run steps on the longest samples in one process that has the whole model, and say "
        "how much memory they take and which batch_size fits",
    )
    dataloader_num_workers: int = option(
        1,
        help="number of processes that tokenize data for each training process; 0: the training process does it itself",
        minimum=0,
        maximum=1024,
    )
    chat_template: str = option(
        "",
        aliases=("template",),
        help="chat template for pairs and conversations of datasets without their own: a built-in name "
        "(docs/data.md lists them), tokenizer (the tokenizer's own), a file, or none; empty: pairs are "
        "used as they are, conversations get the tokenizer's own",
    )
    system: str = option(
        "", help="system message of conversations and pairs that have none; needs a chat template; empty: none"
    )
    chat_template_date: str = option(
        "",
        aliases=("template_date",),
        help="date that templates insert as today's, YYYY-MM-DD; empty: the day on which the run started",
    )
    train_on: str = option(
        "assistant",
        aliases=("loss",),
        case_insensitive=True,
        help="which text of a conversation has a loss: assistant, every turn of the assistant; last, its last "
        "turn; all, the complete text",
        enum=LOSS_MODES,
    )
    turns: str = option(
        "auto",
        case_insensitive=True,
        help="how a conversation becomes samples: auto, as few as the template allows, several if it rewrites "
        "earlier turns; split, one for each turn of the assistant",
        enum=TURNS,
    )
    oversize_rule: str = option(
        OVERSIZE_RULES[0],
        case_insensitive=True,
        help="treatment of records longer than max_length, in datasets without their own rule: segment, head, tail, "
        "drop or whole; docs/data.md describes them",
        enum=OVERSIZE_RULES,
    )
    only_run_dataloader: bool = option(
        False, help="run the data loader alone for train_iters steps and report its speed"
    )
    max_samples: int = option(
        0, help="use the first records of each dataset alone, at most this number; 0: all", minimum=0
    )
    token_cache_dir: str = option(
        "",
        aliases=("token_cache",),
        help="folder that stores tokenized datasets for the next epoch or run; empty: none are stored",
    )
    on_data_change: str = option(
        "refuse",
        aliases=("data_changes",),
        value_aliases={"carry": "allow"},
        help="on resume, if a change leads to other samples (tokenizer, transforms, seed, max_length, "
        "micro-batches per step): refuse it, or allow it and continue the epochs as far as possible. "
        "Adding and removing datasets and changing their shares is always allowed",
        enum=["refuse", "allow"],
    )
    dataloader_prefetch_factor: int = option(
        2, help="chunks of records that each worker tokenizes ahead", minimum=1, maximum=1024
    )

    lr: float = option(1e-2, help="peak learning rate, which the schedule reaches after warmup", minimum=0)
    lr_scheduler: str = option(
        "cosine",
        help="learning rate schedule after warmup; docs/training.md has the formulas",
        case_insensitive=True,
        enum=[
            "cosine",
            "warmupstabledrop",
            "warmupstableexp",
            "linear",
            "constant",
            "noam",
            "polynomial",
            "cosine_with_restarts",
        ],
    )
    warmup_iters: float = option(
        20,
        help="steps of linear warmup from learning rate 0; below 1: a fraction of train_iters; 0: no warmup",
        minimum=0,
    )
    warmup_ratio: float = option(
        0.0,
        help="in place of warmup_iters: steps of warmup as a fraction of train_iters, rounded up to whole steps as in "
        "transformers; 0: warmup_iters counts",
        minimum=0,
        exclusiveMaximum=1,
    )
    drop_iters: float = option(
        0.1,
        help="steps of the final decay of warmupstabledrop, or between two decays of warmupstableexp; below 1: "
        "a fraction of train_iters",
        minimum=0,
    )
    drop_begin: int = option(-1, help="step at which warmupstableexp starts to decay; -1: never", minimum=-1)
    drop_rate: float = option(
        0.5,
        help="factor by which warmupstableexp multiplies the learning rate every drop_iters steps",
        exclusiveMinimum=0,
        maximum=1,
    )
    min_lr_ratio: float = option(
        0.1,
        help="learning rate at the end of cosine, linear, polynomial, cosine_with_restarts and warmupstabledrop, as a "
        "fraction of lr",
        minimum=0,
        maximum=1,
    )
    lr_power: float = option(1.0, help="exponent of polynomial; 1: as linear", exclusiveMinimum=0)
    lr_num_cycles: int = option(1, help="number of times that cosine_with_restarts falls from lr", minimum=1)
    optimizer: str = option(
        "adamw",
        case_insensitive=True,
        help="adamw; adamw8bit, AdamW with moments in 8 bits; adafactor; muon, for the matrices of layers, "
        "with adamw for all other weights; sgd",
        enum=["adamw", "adamw8bit", "adafactor", "muon", "sgd"],
    )
    weight_decay: float = option(
        0.1,
        help="decoupled weight decay of every weight, times the learning rate; with sgd it is added to the gradient, "
        "as torch does; 0: none",
        minimum=0,
    )
    decay_norm_and_bias: bool = option(
        True, help="weight_decay also acts on norms and biases; false: not on them, as in the Trainer of transformers"
    )
    beta1: float = option(0.9, help="decay of AdamW's first moment", minimum=0, exclusiveMaximum=1)
    beta2: float = option(0.95, help="decay of AdamW's second moment", minimum=0, exclusiveMaximum=1)
    eps: float = option(1e-6, help="epsilon in AdamW's denominator", exclusiveMinimum=0)
    sgd_momentum: float = option(0.0, help="momentum of sgd; 0: none", minimum=0, exclusiveMaximum=1)
    muon_momentum: float = option(0.95, help="momentum of muon", minimum=0, exclusiveMaximum=1)
    clip_grad: float = option(
        1.0, help="maximum norm of the gradients, above which they are scaled down; 0: no clipping", minimum=0
    )
    ema_decay: float = option(
        0.0,
        help="decay of a running mean of the weights, which checkpoints store as .ema.pt; 0: no mean",
        minimum=0,
        exclusiveMaximum=1,
    )
    freeze: str = option(
        "",
        help="weights that are not trained: patterns of their names with commas, such as "
        "encoder.layers.[0-9].*; empty: all are trained",
    )
    trainable_layers: int = option(
        0,
        help="train only this number of the last layers, and no weight outside layers; below 0: of the first layers; "
        "0: all weights",
        minimum=-(2**10),
        maximum=2**10,
    )
    new_tokens: str = option(
        "",
        help="file with new tokens, one per line, that are added to the tokenizer and the model; their embeddings "
        "start as the mean of the others; empty: none",
    )
    adapter: str = option(
        "",
        help="LoRA adapter to continue training at step 0: a checkpoint, a PEFT folder, or a folder of fm9g "
        "lora import or combine; its layers, rank, alpha and kind apply; empty: none",
    )
    lora_layer: list[str] = option(
        [],
        help="linear layers that get LoRA adapters, which alone are trained: a JSON list of names; all: every "
        "linear layer except the output; empty: no LoRA",
    )
    lora_r: int = option(8, help="rank of the adapters", minimum=1, maximum=2**16)
    lora_alpha: float = option(
        16.0,
        help="scale of the adapters: their output is multiplied by lora_alpha / lora_r",
        exclusiveMinimum=0,
        maximum=1e6,
    )
    lora_dropout: float = option(
        0.0, help="dropout probability of the adapters' inputs in training; 0: none", minimum=0, exclusiveMaximum=1
    )
    lora_backend: str = option(
        "peft",
        case_insensitive=True,
        help="package that inserts the adapters into the model",
        enum=["peft", "opendelta"],
    )
    modules_to_save: list[str] = option(
        [],
        help="with lora_layer: weights that are trained in full and saved with the adapter: input_embedding, lm_head",
    )
    use_rslora: bool = option(
        False, help="rank-stabilized LoRA: multiply by lora_alpha / sqrt(lora_r) instead of lora_alpha / lora_r"
    )
    use_dora: bool = option(
        False,
        help="DoRA: adapters change the direction of weight rows, and the lengths of the rows are trained separately",
    )
    init_lora_weights: str = option(
        "default",
        case_insensitive=True,
        help="initial adapter weights: default, B is zero; pissa, the largest singular vectors of the base, "
        "which are subtracted from it; pissa_niter_16, a faster approximation of these",
        enum=["default", "pissa", "pissa_niter_16"],
    )
    loraplus_lr_ratio: float = option(
        1.0,
        help="LoRA+: learning rate of B divided by the learning rate of A; 16 is usual; 1: the same for both",
        exclusiveMinimum=0,
    )
    quantization: str = option(
        "none",
        case_insensitive=True,
        help="QLoRA: number format of the frozen layers, in 4 or 8 bits, complete on every process; none: not "
        "quantized",
        enum=["none", "nf4", "fp4", "int8"],
    )
    double_quant: bool = option(True, help="with nf4 and fp4: quantize the scales as well")
    label_smoothing: float = option(
        0.0,
        help="fraction of each target's probability that is spread over all token ids; 0: none",
        minimum=0,
        exclusiveMaximum=1,
    )
    z_loss: float = option(
        0.0, help="weight of the squared logarithm of the softmax denominator in the loss; 0: none", minimum=0
    )
    neftune_alpha: float = option(
        0.0,
        help="NEFTune: uniform noise of +-neftune_alpha / sqrt(document length * width) on the embeddings in "
        "training; 0: none",
        minimum=0,
    )

    device: str = option("auto", help="device to train on; auto: a GPU if there is one", enum=["auto", "cpu", "cuda"])
    flash: str = option(
        "cuda",
        help="attention kernel: cuda, flash-attn, else torch's varlen kernel, else a loop over the documents; "
        "both kernels need bf16 or fp16 on a GPU; none, always the loop",
        enum=["cuda", "none"],
    )
    use_checkpoint: bool = option(False, help="the 9G guide's name for activation_checkpoint full")
    activation_checkpoint: str = option(
        "",
        case_insensitive=True,
        help="what the backward pass recomputes to save memory: full, whole layers; selective, everything "
        "except matrix products and attention; none, nothing; empty: full if use_checkpoint is true, else "
        "none",
        enum=["", "none", "selective", "full"],
    )
    grad_ckpt_num: int = option(
        160, help="number of layers, from the first, that activation checkpointing applies to", minimum=0
    )

    engine: str = option(
        "auto",
        help="library that shards the model over the processes: bmtrain, torch (FSDP2), or auto: bmtrain if "
        "there is a GPU and the package is installed, else torch",
        enum=["auto", "bmtrain", "torch"],
    )
    zero_level: int = option(
        3,
        help="what is sharded over the processes: 3, weights, gradients and optimizer state; 2, the same, but "
        "weights stay gathered from the forward to the backward pass; 0 (engine torch), nothing: full "
        "copies, as in DDP",
        enum=[0, 2, 3],
    )
    tp_size: int = option(
        1,
        help="number of processes that share the work of each layer (tensor parallelism; engine torch); 1: none",
        minimum=1,
    )
    sequence_parallel: bool = option(
        True, help="with tp_size above 1: these processes share the tokens of the norms as well"
    )
    offload_optimizer: bool = option(
        False,
        aliases=("optimizer_offload",),
        help="on machines with GPUs, store and update the optimizer state in host memory",
    )
    loss_scale: float = option(32768, help="with fp16: initial factor by which the loss is multiplied", minimum=1)
    loss_scale_steps: int = option(
        1024, help="with fp16: number of steps without overflow after which the factor doubles", minimum=1
    )
    n_gpus: int = option(
        1,
        help="number of processes that `fm9g train` starts on each machine; --nproc overrides it",
        minimum=1,
        maximum=1024,
    )
    timeout: float = option(
        60,
        help="seconds without a sign of life after which a process or machine counts as lost and the run ends",
        minimum=1,
    )
    step_timeout: float = option(
        1800, help="seconds after which a step counts as hanging; the stacks of all processes are shown then", minimum=1
    )

    @property
    def checkpointing(self) -> str:
        """Activation checkpointing: none, selective or full, whichever of its two keys sets it."""
        return self.activation_checkpoint or ("full" if self.use_checkpoint else "none")

    @property
    def evaluates(self) -> bool:
        """Whether there is data to evaluate on."""
        return bool(self.val_dataset or self.val_data or self.val_split)

    @property
    def trackers(self) -> list[str]:
        """Names of the metric trackers, in addition to the console and metrics.jsonl."""
        return [name for name in map(str.strip, self.report_to.lower().split(",")) if name not in ("", "none")]

    @property
    def last_step(self) -> int:
        """The step after which this launch ends."""
        return min(self.stop_iters or self.train_iters, self.train_iters)

    @property
    def row_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.max_length

    @property
    def samples_per_pack(self) -> int:
        """Samples of a micro-batch without packing; 0 with packing: as many as fit."""
        return 0 if self.packing else self.batch_size

    @property
    def folders(self) -> RunFolders:
        """The folders that the run writes to."""
        return RunFolders.of(self.output_dir, self.model_unique, self.exp_group)

    def interval_steps(self, interval: float) -> int:
        """The steps of save_iters, eval_iters or log_iters. A fraction is rounded up, as in transformers."""
        return math.ceil(self.train_iters * interval) if interval < 1 else int(interval)

    def dp_size(self, world_size: int) -> int:
        """Number of data-parallel replicas.

        Raises:
            UserError: tp_size does not divide the number of processes.
        """
        if world_size % self.tp_size:
            raise UserError(f"tp_size {self.tp_size} does not divide the number of processes, {world_size}")
        return world_size // self.tp_size

    def packs_per_step(self, dp_size: int) -> int:
        """Micro-batches of a step over all replicas.

        Raises:
            UserError: the replicas cannot have equal numbers of them.
        """
        num_packs = self.global_batch_size or self.gradient_accumulation_steps * dp_size
        if num_packs % dp_size:
            possible = [n for n in range(1, num_packs + 1) if num_packs % n == 0]
            raise UserError(
                f"global_batch_size {num_packs} cannot be divided among {dp_size} replicas; possible: {possible}"
            )
        return num_packs

    def iters_for_records(self, num_records: int, packs_per_step: int) -> int:
        """The number of steps of `epochs` passes over records, without packing; an epoch ends with a step."""
        steps_per_epoch = math.ceil(num_records / (self.batch_size * packs_per_step))
        return max(1, math.ceil(self.epochs * steps_per_epoch))

    def iters_for_epochs(self, tokens: float, tokens_per_step: int) -> int:
        """The number of steps of `epochs` passes over `tokens` tokens."""
        return max(1, math.ceil(self.epochs * tokens / tokens_per_step))

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules_to_save", rules.canonical_modules(self.modules_to_save))
        rules.check_train_config(self)
        object.__setattr__(self, "lora_layer", rules.canonical_layers(self.lora_layer))
