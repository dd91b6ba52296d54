"""DeepSpeed: the documented keys of its JSON configuration, with dots for nested ones.

zero_level here is 3 for stage 3, 2 for the stages 1 and 2, which shard less, and 0 for stage 0. Every stage computes
the same numbers.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from fm9g.config.dialects.table import Dialect, Given, Keys, Row, parse_text
from fm9g.config.dialects.translate import translate
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object

_AUTO = "auto"  # as the arguments of the Trainer say
_BUCKETS = "the engine chooses its buffers"
_SHOWN = "what is shown does not change what is trained"
_NAMED = {f"zero{stage}{suffix}": stage for stage in range(4) for suffix in ("", "_offload")}  # as in ms-swift
# The files that Qwen, LLaMA-Factory and others publish with their scripts: ds_config_zero3.json, ds_z3_config.json.
_PUBLISHED_NAME = re.compile(r"ds_(?:config_)?z(?:ero)?([0-3])[^/]*\.json$")
_STAGES: dict[int, Keys] = {
    0: {"zero_level": 0, "engine": "torch"},
    **{stage: {"zero_level": max(2, stage)} for stage in (1, 2, 3)},
}
# Keys of the Trainer that a DeepSpeed file has, too: our key -> the argument there.
_SHARED = {
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "clip_grad": "max_grad_norm",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "warmup_iters": "warmup_steps",
    "train_iters": "max_steps",
}
_WARMUP_STEPS = 1000  # default of its schedulers
_COS_MIN_RATIO = 1e-4  # default of WarmupCosineLR


def zero(given: Given) -> Keys:
    """The stage, and what is offloaded to the host."""
    stage = given["zero_optimization.stage"]
    if stage not in (None, 0, 1, 2, 3):
        raise given.error("zero_optimization.stage", f"found {stage!r}, expected 0, 1, 2 or 3")
    keys = dict(_STAGES[stage or 0])
    if stage == 1:
        given.notes.append(
            "zero_optimization.stage 1: zero_level 2 shards the gradients, too; the numbers are the same"
        )
    if "nvme" in (given["zero_optimization.offload_optimizer.device"], given["zero_optimization.offload_param.device"]):
        raise given.error("zero_optimization", "offloading to NVMe is not supported; write cpu")
    if given["zero_optimization.offload_optimizer.device"] == "cpu" or given["zero_optimization.cpu_offload"]:
        keys["offload_optimizer"] = True
    if given["zero_optimization.offload_param.device"] == "cpu":
        given.notes.append("offload_param: weights stay on the devices, sharded; only the optimizer is offloaded")
        keys["offload_optimizer"] = True
    return keys


def precision(given: Given) -> Keys:
    """fp16 and its loss scale, bf16."""
    bf16, fp16 = given["bf16.enabled"], given["fp16.enabled"]
    if bf16 is True and fp16 is True:
        raise given.error("fp16.enabled", "bf16 and fp16 are both enabled; keep one of them")
    if bf16 is True or fp16 is True:
        keys: Keys = {"model.half_type": "bf16" if bf16 is True else "fp16"}
        if fp16 is True:
            keys |= _loss_scale(given)
        return keys
    return {}


def _loss_scale(given: Given) -> Keys:
    fixed = given.number("fp16.loss_scale")
    if fixed:
        raise given.error("fp16.loss_scale", f"found {fixed:g}: the loss scale is dynamic here; write 0")
    keys: Keys = {}
    if (power := given.number("fp16.initial_scale_power")) is not None:
        keys["loss_scale"] = float(2**power)
    if (window := given.number("fp16.loss_scale_window")) is not None:
        keys["loss_scale_steps"] = int(window)
    return keys


def batch(given: Given) -> Keys:
    """Samples per micro-batch, micro-batches per step, and their product."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    numbers = {name: given.number(name) for name in names if given[name] not in (None, _AUTO)}
    keys: Keys = {}
    if "train_micro_batch_size_per_gpu" in numbers:
        keys["batch_size"] = numbers["train_micro_batch_size_per_gpu"]
    if "gradient_accumulation_steps" in numbers:
        keys["gradient_accumulation_steps"] = numbers["gradient_accumulation_steps"]
    total = numbers.get("train_batch_size")
    if total is None:
        return keys
    if "batch_size" not in keys:
        raise given.error("train_batch_size", "give train_micro_batch_size_per_gpu as well, or auto")
    if min(keys.values()) <= 0 or total % math.prod(keys.values()):
        factors = " x ".join(f"{name} {numbers[name]}" for name in names[:2] if name in numbers)
        raise given.error("train_batch_size", f"{total} is no multiple of {factors}")
    if "gradient_accumulation_steps" in keys:
        processes = total // math.prod(keys.values())
        given.notes.append(f"train_batch_size {total}: holds for {processes} processes; another number changes it")
    else:
        keys["global_batch_size"] = total // keys["batch_size"]
    return keys


def clipping(given: Given) -> Keys:
    """The maximum norm of the gradients."""
    return {} if given["gradient_clipping"] in (None, _AUTO) else {"clip_grad": given.number("gradient_clipping")}


def optimizer(given: Given) -> Keys:
    """The optimizer block."""
    kind = str(given["optimizer.type"] or "").lower()
    if not kind:
        return {}
    known = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "muon": "muon"}
    if kind not in known:
        raise given.error("optimizer.type", f"found {kind!r}, expected one of {', '.join(known)}")
    keys: Keys = {"optimizer": known[kind]}
    for name, key in (("lr", "lr"), ("eps", "eps"), ("weight_decay", "weight_decay"), ("momentum", "sgd_momentum")):
        if given[f"optimizer.params.{name}"] not in (None, _AUTO):
            keys[key] = given.number(f"optimizer.params.{name}")
    if (betas := given["optimizer.params.betas"]) not in (None, _AUTO):
        if not isinstance(betas, list) or len(betas) != 2:
            raise given.error("optimizer.params.betas", f"found {betas!r}, expected two numbers")
        keys["beta1"], keys["beta2"] = betas
    return keys


def scheduler(given: Given) -> Keys:
    """The scheduler block."""
    kind = given.text("scheduler.type")
    if not kind:
        return {}
    known = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if kind not in known:
        raise given.error("scheduler.type", f"found {kind!r}, expected one of {', '.join(known)}")
    keys: Keys = {"lr_scheduler": known[kind], "min_lr_ratio": _COS_MIN_RATIO if kind == "WarmupCosineLR" else 0.0}
    for name in ("scheduler.params.warmup_min_lr", "scheduler.params.warmup_min_ratio"):
        if given[name] not in (None, _AUTO, 0):
            raise given.error(name, "warmup starts at 0 here; write 0")
    if (steps := given["scheduler.params.warmup_num_steps"]) != _AUTO:
        keys |= {"warmup_iters": _WARMUP_STEPS if steps is None else steps, "warmup_ratio": 0.0}
    if given["scheduler.params.warmup_type"] != "linear":
        given.notes.append(
            f"scheduler {kind}: its warmup is logarithmic unless warmup_type is linear; here it is linear"
        )
    for name, key in (("warmup_max_lr", "lr"), ("total_num_steps", "train_iters"), ("cos_min_ratio", "min_lr_ratio")):
        if given[f"scheduler.params.{name}"] not in (None, _AUTO):
            keys[key] = given.number(f"scheduler.params.{name}")
    return keys


ROWS = (
    *(Row(f"zero_optimization.{name}", rule=zero) for name in (
        "stage", "cpu_offload", "offload_optimizer.device", "offload_param.device",
    )),
    *(Row(f"zero_optimization.{name}", ignored=_BUCKETS) for name in (
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
        "contiguous_gradients", "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "offload_optimizer.pin_memory", "offload_optimizer.buffer_count", "offload_optimizer.fast_init",
        "offload_optimizer.ratio", "offload_optimizer.nvme_path", "offload_param.pin_memory",
        "offload_param.buffer_count", "offload_param.buffer_size", "offload_param.max_in_cpu",
        "offload_param.nvme_path", "load_from_fp32_weights", "elastic_checkpoint", "ignore_unused_parameters",
        "memory_efficient_linear", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
        "log_trace_cache_warnings",
    )),
    Row("zero_optimization.stage3_gather_16bit_weights_on_model_save", ignored="checkpoints are complete",
        aliases=("zero_optimization.stage3_gather_fp16_weights_on_model_save",)),
    Row("fp16.enabled", rule=precision),
    Row("fp16.loss_scale", rule=precision),
    Row("fp16.initial_scale_power", rule=precision),
    Row("fp16.loss_scale_window", rule=precision),
    Row("fp16.hysteresis", ignored="every overflow halves the loss scale"),
    Row("fp16.consecutive_hysteresis", ignored="every overflow halves the loss scale"),
    Row("fp16.min_loss_scale", ignored="a run ends after max_skipped_steps overflows in a row"),
    Row("fp16.auto_cast", ignored="weights are kept in fp32, and computed with in fp16"),
    Row("fp16.fp16_master_weights_and_grads", refused="weights are kept in fp32", harmless=(False,)),
    Row("bf16.enabled", rule=precision, aliases=("bfloat16.enabled",)),
    Row("gradient_clipping", rule=clipping),
    Row("train_batch_size", rule=batch),
    Row("train_micro_batch_size_per_gpu", rule=batch),
    Row("gradient_accumulation_steps", rule=batch),
    *(Row(f"optimizer.{name}", rule=optimizer) for name in (
        "type", "params.lr", "params.betas", "params.eps", "params.weight_decay", "params.momentum",
    )),
    Row("optimizer.params.torch_adam", ignored="AdamW is that of torch"),
    Row("optimizer.params.adam_w_mode", refused="weight decay is decoupled", harmless=(True,)),
    *(Row(f"scheduler.{name}", rule=scheduler) for name in (
        "type", "params.warmup_min_lr", "params.warmup_min_ratio", "params.warmup_max_lr", "params.warmup_num_steps",
        "params.total_num_steps", "params.warmup_type", "params.cos_min_ratio",
    )),
    *(Row(name, ignored=_SHOWN) for name in (
        "steps_per_print", "wall_clock_breakdown", "wall_clock_breakdowm", "dump_state", "memory_breakdown",
        "tensorboard.enabled", "tensorboard.output_path", "tensorboard.job_name", "wandb.enabled",
        "comms_logger.enabled", "flops_profiler.enabled",
    )),
    Row("communication_data_type", ignored="gradients are reduced in the precision of the engine"),
    Row("prescale_gradients", ignored="gradients are averaged over tokens"),
    Row("gradient_predivide_factor", ignored="gradients are averaged over tokens"),
    Row("sparse_gradients", refused="gradients are dense", harmless=(False,)),
    Row("zero_allow_untested_optimizer", ignored="every optimizer is tested with sharding"),
    Row("zero_force_ds_cpu_optimizer", ignored="the offloaded optimizer is that of torch"),
    Row("activation_checkpointing.partition_activations", ignored="write activation_checkpoint full"),
    Row("activation_checkpointing.cpu_checkpointing", refused="activations stay on the device", harmless=(False,)),
)  # fmt: skip
DEEPSPEED = Dialect("deepspeed", "DeepSpeed", ROWS, version="0.19", distinctive=("zero_optimization.stage",))


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def deepspeed_file(given: Given) -> Keys:
    """The keys of a DeepSpeed configuration: a file, an object, or zero0 to zero3 as in ms-swift.

    Raises UserError for a value that contradicts an argument of the Trainer, as transformers does.
    """
    value = next((value for name in ("deepspeed", "deepspeed_config_path") if (value := given[name])), None)
    if value is None:
        return {}
    path = None if isinstance(value, dict) else _file(str(value), given)
    if path is None and str(value) in _NAMED:
        return _STAGES[_NAMED[str(value)]] | ({"offload_optimizer": True} if str(value).endswith("_offload") else {})
    if path is None and not isinstance(value, dict):
        stage = _PUBLISHED_NAME.search(str(value))
        if stage is None:
            raise UserError(
                f"{given.prefix}deepspeed: {value}: no such file; give a file, one of {', '.join(_NAMED)}, or "
                "leave it out: zero_level 3 is the default"
            )
        given.notes.append(f"deepspeed: {value} is not here; stage {stage[1]} is taken from its name")
        return _STAGES[int(stage[1])] | ({"offload_optimizer": True} if "offload" in str(value) else {})
    content = value if path is None else read_config_object(path)
    flat = flatten(content)
    translation = translate(DEEPSPEED, flat, str(value) if not isinstance(value, dict) else "deepspeed")
    given.notes.extend(translation.all_notes)
    if "lr_scheduler" in translation.keys and "lr_scheduler_type" in given.given:
        given.notes.append("lr_scheduler_type: the scheduler block of DeepSpeed applies in its place, as there")
    for name in ("bf16", "fp16"):
        in_file = parse_text(flat.get(f"{name}.enabled"))
        if name in given.given and isinstance(in_file, bool) and in_file != given.flag(name):
            raise given.error(name, f"contradicts {name}.enabled of DeepSpeed; write auto in the file of DeepSpeed")
    for key, name in _SHARED.items():
        if key in translation.keys and name in given.given and given[name] != translation.keys[key]:
            raise UserError(
                f"{translation.origins[key]} is {translation.keys[key]}, but {given.prefix}{name} is {given[name]}; "
                "write auto in the file of DeepSpeed"
            )
    if "train_iters" in translation.keys and "max_steps" not in given.given:
        raise UserError(f"{translation.origins['train_iters']}: needs max_steps; write auto in the file of DeepSpeed")
    return translation.keys


def _file(name: str, given: Given) -> Path | None:
    """The path of a DeepSpeed file: from the current folder, or beside the file that names it; None: there is none."""
    beside = Path(given.prefix.rpartition(": ")[0]).parent / name
    return next((path for path in (Path(name), beside) if path.is_file()), None)
