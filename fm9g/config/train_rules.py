"""Rules on combinations of training keys, and on training keys and the model. One message per rule.

The names of keys in messages are those that users type.
"""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from fm9g.config import foreign
from fm9g.config.fields import default_value, did_you_mean, keys_of
from fm9g.config.mixture import check_template
from fm9g.config.model import ModelConfig
from fm9g.errors import UserError

if TYPE_CHECKING:
    from fm9g.config.train import TrainConfig

# Keys that describe adapters and mean nothing without them.
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
    "modules_to_save",
)
# The linear layers of each transformer layer.
LINEAR_LAYERS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")
# The modules that modules_to_save selects, by their names here and in other families.
EMBEDDING, LM_HEAD = "input_embedding", "lm_head"
_MODULES = {
    EMBEDDING: (EMBEDDING, "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embedding"),
    LM_HEAD: (LM_HEAD, "output", "output_layer", "embed_out"),
}
_ALL_LINEAR = ("all", "all-linear")  # LLaMA-Factory and PEFT select all of them by these words
_TRACKERS = {"tensorboard", "wandb", "swanlab"}
_MAX_ROW_TOKENS = 2**31


def canonical_layers(layers: list[str]) -> list[str]:
    """The names here of the linear layers that lora_layer names: as here, as in another family, or all of them."""
    if {name.lower() for name in layers} & set(_ALL_LINEAR):
        return list(LINEAR_LAYERS)
    return list(dict.fromkeys(each for name in layers for each in foreign.LAYERS.get(name, (name,))))


def canonical_modules(names: list[str]) -> list[str]:
    """The names here of the modules that modules_to_save names, in a fixed order. Raises UserError for others."""
    endings = [name.removesuffix(".weight").rpartition(".")[2] for name in names]
    known = {alias: module for module, aliases in _MODULES.items() for alias in aliases}
    if unknown := [name for name, ending in zip(names, endings) if ending not in known]:
        raise UserError(
            f"modules_to_save: {unknown[0]!r} cannot be trained in full beside adapters; only these can: "
            f"{', '.join(_MODULES)}"
        )
    return [module for module in _MODULES if module in map(known.__getitem__, endings)]


def check_train_config(config: TrainConfig) -> None:
    """Raises UserError for values that are impossible, alone or together."""
    _check_names(config)
    _check_data(config)
    _check_resume(config)
    _check_method(config)
    _check_templates(config)
    _check_batch(config)
    check_parallelism(
        config.engine,
        config.zero_level,
        config.tp_size,
        config.sequence_parallel,
        config.batch_size * config.max_length,
    )
    _check_adapters(config)
    _check_validation_and_trackers(config)
    if config.tp_size > 1 and config.neftune_alpha:
        raise UserError("neftune_alpha cannot be used with tp_size: the ranks would draw different noise")
    _check_schedule(config)
    _check_intervals(config)
    _require_choice(config, "sgd_momentum", "optimizer", "sgd")


def check_parallelism(engine: str, zero_level: int, tp_size: int, sequence_parallel: bool, row_tokens: int) -> None:
    """Raises UserError if an engine cannot run with these settings.

    Args:
        engine: bmtrain, torch or auto.
        row_tokens: tokens of a micro-batch.
    """
    if tp_size > 1 and engine == "bmtrain":
        raise UserError(f"tp_size {tp_size} needs --engine torch; bmtrain shards by ZeRO alone")
    if zero_level == 0 and engine == "bmtrain":
        raise UserError("zero_level 0 needs --engine torch; bmtrain supports 2 and 3")
    if sequence_parallel and row_tokens % tp_size:
        raise UserError(f"tp_size {tp_size} does not divide batch_size * max_length, {row_tokens}")


def check_model_parallelism(model: ModelConfig, tp_size: int) -> None:
    """Raises UserError if tensor parallelism cannot divide the model."""
    if tp_size == 1:
        return
    if model.qk_norm:  # each rank would have the gradients of its own heads alone
        raise UserError(f"tp_size {tp_size} cannot be used with a model whose qk_norm is true; ZeRO shards it instead")
    for key, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads)):
        if heads % tp_size:
            raise UserError(f"tp_size {tp_size} does not divide the model's {key}, {heads}")


def check_trainable_layers(model: ModelConfig, trainable_layers: int) -> None:
    """Raises UserError if the model has fewer layers than are to be trained."""
    if abs(trainable_layers) > model.num_layers:
        raise UserError(
            f"trainable_layers {trainable_layers}: the model has {model.num_layers} layers; 0 trains all of its weights"
        )


def reject_adapter_keys(config: TrainConfig) -> None:
    """Raises UserError if a key of adapters has another value than its default; for a run without adapters."""
    fields = keys_of(type(config))
    if given := [key for key in ADAPTER_KEYS if getattr(config, key) != default_value(fields[key])]:
        raise UserError(f"{given[0]} is given and lora_layer is not: there are no adapters for it to act on")


def _check_names(config: TrainConfig) -> None:
    for key in ("model_unique", "exp_group"):
        name = getattr(config, key)
        if "/" in name or name in (".", "..") or (key == "model_unique" and not name):
            raise UserError(f"{key}: found {name!r}, expected a plain name: it is part of the names of folders")


def _check_method(config: TrainConfig) -> None:
    adapters = "lora_layer" if config.lora_layer else "adapter" if config.adapter else ""
    if config.method in ("full", "freeze") and adapters:
        raise UserError(f"method {config.method} and {adapters} are both given; adapters are trained by method lora")
    if config.method == "qlora" and config.quantization == "none":
        raise UserError("method qlora and quantization none are both given; without quantization, write method lora")
    if config.method == "freeze" and not (config.trainable_layers or config.freeze):
        raise UserError("method freeze with trainable_layers 0 freezes nothing; give a number of layers, or freeze")


def _check_data(config: TrainConfig) -> None:
    if config.data and config.dataset_config:
        raise UserError("data and dataset_config are both given; keep one of them, or name both in data, with a comma")
    if config.val_data and config.val_dataset:
        raise UserError("val_data and val_dataset are both given; keep one of them, or name both in val_data")
    of_data = [key for key in ("val_split", "train_sample") if getattr(config, key)]
    if of_data and not config.data:
        raise UserError(f"{of_data[0]} is given and data is not; a dataset of a mixture has sample and sample_skip")
    if config.val_split and (config.val_data or config.val_dataset):
        other = "val_data" if config.val_data else "val_dataset"
        raise UserError(f"val_split and {other} are both given; evaluate on one of them")
    if config.val_sample and not (config.val_split or config.val_data):
        raise UserError("val_sample is given, and neither val_split nor val_data: there is nothing to draw from")


def _check_resume(config: TrainConfig) -> None:
    step = config.resume_ckpt
    is_step = step.isascii() and step.isdecimal() and len(step) < 17
    if step and step not in ("auto", "last", "best") and not is_step:
        raise UserError(f"resume_ckpt: found {step!r}, expected the number of a step, auto, last or best")
    if config.resume_ckpt and config.overwrite:
        raise UserError("resume_ckpt and overwrite are both given; a run either resumes or starts again")
    if config.new_tokens and not config.only_load_model:
        raise UserError(
            "new_tokens and only_load_model false are both given: the optimizer's state has no values for new tokens"
        )
    if config.only_run_dataloader and config.resume_ckpt:
        raise UserError("only_run_dataloader and resume_ckpt are both given; the loader alone starts at step 0")


def _check_templates(config: TrainConfig) -> None:
    check_template(config.chat_template)
    if config.chat_template_date and not _is_date(config.chat_template_date):
        raise UserError(f"chat_template_date: found {config.chat_template_date!r}, expected a date such as 2026-07-26")


def _check_batch(config: TrainConfig) -> None:
    if (row := config.batch_size * config.max_length) >= _MAX_ROW_TOKENS:
        raise UserError(f"batch_size * max_length: {row} tokens are too many for a row")
    if config.global_batch_size and config.gradient_accumulation_steps != 1:
        raise UserError("global_batch_size and gradient_accumulation_steps are both given; keep one of them")


def _check_validation_and_trackers(config: TrainConfig) -> None:
    if config.early_stopping_patience and not config.evaluates:
        raise UserError("early_stopping_patience needs data to evaluate on: val_dataset, val_data or val_split")
    named = [name.strip() for name in config.report_to.lower().split(",")]
    if "none" in named and config.trackers:
        raise UserError(f"report_to: found {config.report_to!r}: none cannot be combined with a tracker")
    if unknown := sorted(set(config.trackers) - _TRACKERS):
        raise UserError(f"report_to: found {unknown[0]!r}, expected tensorboard, wandb, swanlab, or none")


def _check_schedule(config: TrainConfig) -> None:
    drop_steps = config.drop_iters * config.train_iters
    if 0 < config.drop_iters < 1 and drop_steps < 1 and config.lr_scheduler == "warmupstabledrop":
        raise UserError(f"drop_iters {config.drop_iters} of train_iters {config.train_iters} is less than one step")
    default_warmup = keys_of(type(config))["warmup_iters"].default
    if config.warmup_ratio and config.warmup_iters not in (0, default_warmup):
        raise UserError(
            f"warmup_iters {config.warmup_iters:g} and warmup_ratio {config.warmup_ratio:g} are both given; "
            "keep one of them, and set the other to 0"
        )
    _require_choice(config, "lr_power", "lr_scheduler", "polynomial")
    _require_choice(config, "lr_num_cycles", "lr_scheduler", "cosine_with_restarts")


def _require_choice(config: TrainConfig, key: str, chooser: str, choice: str) -> None:
    """Raises UserError if a key has another value than its default, and means nothing without a value of `chooser`."""
    if getattr(config, key) != default_value(keys_of(type(config))[key]) and getattr(config, chooser) != choice:
        raise UserError(f"{key} is given, and {chooser} is {getattr(config, chooser)}: it is a key of {choice}")


def _check_intervals(config: TrainConfig) -> None:
    for key in ("save_iters", "eval_iters", "log_iters"):
        interval = getattr(config, key)
        if interval > 1 and interval != int(interval):
            raise UserError(f"{key}: found {interval}, expected whole steps, or a fraction of train_iters below 1")


def _check_adapters(config: TrainConfig) -> None:
    _check_adapter_layers(config)
    if not config.lora_layer and not config.adapter:
        if not config.resume_ckpt:  # a checkpoint may hold adapters
            reject_adapter_keys(config)
        return
    if not config.pretrained_model and not config.resume_ckpt and not config.adapter:
        raise UserError("lora_layer needs a pretrained_model: adapters are trained on the weights of a model")
    if not config.strict_state_dict:
        raise UserError("strict_state_dict false cannot be used with lora_layer: adapters need a complete base model")
    if config.optimizer == "adafactor":
        raise UserError(
            "optimizer adafactor cannot be used with lora_layer: its steps are relative to the size of a weight, and "
            "an adapter's B starts at zero, so it would never move; use adamw8bit to save memory"
        )
    if given := [key for key in ("freeze", "trainable_layers") if getattr(config, key)]:
        key = "lora_layer" if config.lora_layer else "adapter"
        raise UserError(f"{given[0]} and {key} are both given; with adapters nothing else is trained anyway")
    if config.tp_size > 1:
        raise UserError(
            f"tp_size {config.tp_size} cannot be used with lora_layer; ZeRO shards adapters and model alike"
        )
    if not config.only_load_model or config.load_dataloader_ckpt:
        raise UserError(
            "only_load_model false and load_dataloader_ckpt cannot be used with lora_layer: use resume_ckpt"
        )
    if config.use_dora and config.init_lora_weights != "default":
        raise UserError("use_dora and init_lora_weights pissa are both given; keep one of them")
    if config.lora_backend == "opendelta" and (config.use_dora or config.quantization != "none"):
        raise UserError("lora_backend opendelta supports neither use_dora nor quantization; use peft")


def _check_adapter_layers(config: TrainConfig) -> None:
    known = (*LINEAR_LAYERS, *foreign.LAYERS)
    names = [name for name in config.lora_layer if name.lower() not in _ALL_LINEAR]
    if unknown := [name for name in names if name.rpartition(".")[2] not in known]:
        hint = did_you_mean(unknown[0], [*LINEAR_LAYERS, *foreign.LAYERS])
        raise UserError(
            f"lora_layer: {unknown[0]!r} is not the name of a linear layer; these are: {', '.join(LINEAR_LAYERS)}, the "
            f"names of other families, and all for every one{hint}"
        )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
