"""Rules: keys of ours that several arguments of another tool decide together. Each is shared by all dialects."""

from __future__ import annotations

from pathlib import Path

from fm9g.config.dialects.conversions import dtype, layers, trackers
from fm9g.config.dialects.table import Given, Keys, Rule, parse_text
from fm9g.errors import UserError

STRATEGIES = ("no", "steps", "epoch")
ADAPTER_METHODS = ("lora", "qlora")
_ONCE = 2**31 - 1  # an interval that no run reaches: the last step is evaluated and saved in any case
VALIDATION_NAMES = ("eval_data_path", "eval_file", "validation_file", "eval_dataset", "val_dataset")
# Schedules of transformers that are ours, step by step: name there -> keys here.
SCHEDULES: dict[str, Keys] = {
    "linear": {"lr_scheduler": "linear", "min_lr_ratio": 0.0},
    "cosine": {"lr_scheduler": "cosine", "min_lr_ratio": 0.0},
    "cosine_with_restarts": {"lr_scheduler": "cosine_with_restarts", "min_lr_ratio": 0.0},
    "cosine_with_min_lr": {"lr_scheduler": "cosine"},
    "polynomial": {"lr_scheduler": "polynomial"},
    "constant": {"lr_scheduler": "constant", "warmup_iters": 0, "warmup_ratio": 0.0},  # warmup has no effect there
    "constant_with_warmup": {"lr_scheduler": "constant"},
    "inverse_sqrt": {"lr_scheduler": "noam"},
    "warmup_stable_decay": {"lr_scheduler": "warmupstabledrop", "min_lr_ratio": 0.0},
}
_UNSUPPORTED_SCHEDULES = {
    "reduce_lr_on_plateau": "it depends on the validation loss",
    "greedy": "it depends on the loss",
    "cosine_warmup_with_min_lr": "write cosine_with_min_lr",
}
# Options of lr_scheduler_kwargs -> key here, by schedule. An absolute rate is divided by the learning rate.
_SCHEDULE_OPTIONS = {
    ("cosine_with_min_lr", "min_lr_rate"): "min_lr_ratio",
    ("cosine_with_min_lr", "min_lr"): "min_lr",
    ("cosine_with_restarts", "num_cycles"): "lr_num_cycles",
    ("polynomial", "power"): "lr_power",
    ("polynomial", "lr_end"): "min_lr",
    ("warmup_stable_decay", "num_decay_steps"): "drop_iters",
    ("warmup_stable_decay", "min_lr_ratio"): "min_lr_ratio",
}
_DEFAULT_OPTIONS = {  # options with the value that ours have
    ("cosine", "num_cycles", 0.5),
    ("cosine_with_min_lr", "num_cycles", 0.5),
    ("warmup_stable_decay", "decay_type", "linear"),
    ("warmup_stable_decay", "warmup_type", "linear"),
}


def training_length(given: Given) -> Keys:
    """num_train_epochs, and max_steps, which wins if it is positive."""
    steps, epochs = given.number("max_steps"), given.number("num_train_epochs")
    if steps is not None and steps > 0:
        return {"train_iters": int(steps)}
    return {} if epochs is None else {"epochs": float(epochs)}


def warmup(given: Given) -> Keys:
    """warmup_steps, a fraction if it is below 1, and warmup_ratio, which counts if there are no steps."""
    if given["lr_scheduler_type"] == "constant":
        return {}
    steps, ratio = given.number("warmup_steps") or 0, given.number("warmup_ratio") or 0
    if steps >= 1:
        return {"warmup_iters": int(steps), "warmup_ratio": 0.0}
    return {"warmup_iters": 0, "warmup_ratio": float(steps or ratio)}


def schedule(given: Given) -> Keys:
    """lr_scheduler_type and lr_scheduler_kwargs."""
    name = given.choice("lr_scheduler_type", *SCHEDULES, *_UNSUPPORTED_SCHEDULES)
    if name in _UNSUPPORTED_SCHEDULES:
        raise given.error("lr_scheduler_type", f"{name} is not supported: {_UNSUPPORTED_SCHEDULES[name]}")
    options = given["lr_scheduler_kwargs"] or {}
    if not isinstance(options, dict):
        raise given.error("lr_scheduler_kwargs", f"found {options!r}, expected an object")
    if name == "polynomial":
        options = {"lr_end": 1e-7, **options}  # the default there
    keys = dict(SCHEDULES.get(name, {}))
    for option, value in options.items():
        if (name, option, value) in _DEFAULT_OPTIONS:
            continue
        key = _SCHEDULE_OPTIONS.get((name, option))
        if key is None:
            raise given.error("lr_scheduler_kwargs", f"{option} {value} cannot be set for {name} here")
        try:
            number = float(parse_text(value))
        except (TypeError, ValueError):
            raise given.error("lr_scheduler_kwargs", f"{option}: found {value!r}, expected a number") from None
        if key == "min_lr":
            keys["min_lr_ratio"] = number / (given.number("learning_rate") or 1.0)
        else:
            keys[key] = int(number) if key == "drop_iters" else number
    if name == "cosine_with_min_lr" and "min_lr_ratio" not in keys:
        raise given.error("lr_scheduler_kwargs", "cosine_with_min_lr needs min_lr or min_lr_rate")
    if name == "warmup_stable_decay" and options.get("decay_type") != "linear":
        given.notes.append(
            "lr_scheduler_type: the decay is linear here; there it is a cosine unless decay_type says so"
        )
    if name == "inverse_sqrt" and not (given.number("warmup_steps") or given.number("warmup_ratio")):
        raise given.error(
            "lr_scheduler_type", "inverse_sqrt without warmup is another function there; give warmup_steps"
        )
    return keys


def evaluation(given: Given) -> Keys:
    """The data to evaluate on, and how often."""
    strategy = given.choice("eval_strategy", *STRATEGIES)
    data = given.first(*VALIDATION_NAMES)
    share = next((share for name in ("val_size", "split_dataset_ratio") if (share := given.number(name))), 0)
    keys: Keys = {"val_data": data} if data else {}
    if share and not data:
        keys["val_split" if share < 1 else "val_sample"] = share if share < 1 else int(share)
    if not keys:
        return {}
    if strategy == "no":
        if share and not data:
            given.notes.append("eval_strategy no: the validation records are set aside, and evaluated at the end")
            return keys | {"eval_iters": _ONCE}
        given.notes.append("eval_strategy no: the validation data is not used")
        return {}
    return keys | _interval("eval_iters", strategy, given, "eval_steps", "logging_steps")


def saving(given: Given) -> Keys:
    """How often checkpoints are saved."""
    strategy = given.choice("save_strategy", *STRATEGIES, "best")
    if strategy == "no":
        return {"save": False}
    if strategy == "best":
        given.notes.append("save_strategy best: every evaluation step saves; RUN/best is the best of them")
        return _interval("save_iters", "steps", given, "eval_steps", "save_steps")
    return _interval("save_iters", strategy, given, "save_steps", "eval_steps")


def logging(given: Given) -> Keys:
    """How often metrics are logged."""
    strategy = given.choice("logging_strategy", *STRATEGIES)
    if strategy == "no":
        given.notes.append("logging_strategy no: metrics are logged every logging_steps steps all the same")
    return _interval("log_iters", "" if strategy == "no" else strategy, given, "logging_steps")


def _interval(key: str, strategy: str, given: Given, *names: str) -> Keys:
    """An interval in steps, or as a fraction of the run; one epoch of several is a fraction."""
    if strategy == "epoch":
        steps, epochs = given.number("max_steps") or 0, given.number("num_train_epochs") or 1
        if steps > 0:
            given.notes.append(f"{key}: with max_steps, the length of an epoch is not known; once, at the end")
            return {key: _ONCE}
        return {key: 1 / epochs} if epochs > 1 else {key: _ONCE}
    value = next((value for name in names if (value := given.number(name))), None)
    return {} if value is None else {key: value}


def precision(given: Given) -> Keys:
    """bf16, fp16 and the dtype of the model."""
    bf16, fp16 = given.flag("bf16"), given.flag("fp16")
    if bf16 and fp16:
        raise given.error("fp16", "bf16 and fp16 are both true; keep one of them")
    named = given.first("torch_dtype", "dtype", "compute_type")
    if bf16 or fp16:
        return {"model.half_type": "bf16" if bf16 else "fp16"}
    if not named or named == "auto":
        return {} if named or not {"bf16", "fp16"} & set(given.values) else {"model.half_type": "fp32"}
    try:
        return {"model.half_type": dtype(named)}
    except ValueError as error:
        raise UserError(f"{given.prefix}torch_dtype: found {named!r}, {error}") from None


_TUNER_NAMES = ("finetuning_type", "tuner_type", "sft_type", "train_mode")


def tuner(given: Given) -> Keys:
    """Which weights are trained, and in how many bits the others are."""
    kind = given.first(*_TUNER_NAMES).lower()
    if kind and kind not in ("lora", "full", "freeze", "qlora", "dora"):
        name = next(name for name in _TUNER_NAMES if given.text(name))
        raise given.error(name, f"{kind} is not supported; write lora, qlora, full or freeze")
    for name in ("use_lora", "q_lora", "qlora", "use_qlora"):
        if name in given.values and given.flag(name):
            kind = kind or "lora" if name == "use_lora" else "qlora"
    bits = _bits(given)
    if bits and kind in ("full", "freeze"):
        raise given.error("quantization_bit", f"a model in {bits} bits is trained by lora, not by {kind}")
    keys: Keys = {"method": "full" if not kind else "lora" if kind == "dora" else kind}
    if kind == "dora":
        keys["use_dora"] = True
    if bits and keys["method"] in ADAPTER_METHODS:
        form = given.first("bnb_4bit_quant_type", "quantization_type").lower() or "nf4"
        keys |= {"method": "qlora", "quantization": form if bits == 4 else "int8"}
    return keys


def adapter_rule(method: Rule, names: dict[str, str]) -> Rule:
    """A rule for the size of adapters: these arguments have no effect on a run without them, as in the other tools.

    Args:
        method: the rule that says what is trained.
        names: key of ours -> the argument there.
    """

    def adapters(given: Given) -> Keys:
        """Layers, rank, scale and dropout of the adapters. Without adapters they have no effect, as there."""
        if method(given)["method"] not in ADAPTER_METHODS:
            return {}
        keys = {key: given[name] for key, name in names.items() if given[name] is not None}
        return keys | ({"lora_layer": layers(keys["lora_layer"])} if "lora_layer" in keys else {})

    return adapters


def _bits(given: Given) -> int:
    """4, 8, or 0 for a model that is not quantized."""
    if given.flag("load_in_4bit"):
        return 4
    if given.flag("load_in_8bit"):
        return 8
    names = ("quantization_bit", "quant_bits")
    bits = next((bits for name in names if (bits := given[name]) not in (None, "none", 0)), 0)
    bits = {"int4": 4, "int8": 8, "nf4": 4}.get(str(bits), bits)
    if bits not in (0, 4, 8):
        raise given.error("quantization_bit", f"found {bits!r}, expected 4, 8 or none")
    return int(bits)


def data(given: Given) -> Keys:
    """The files or datasets to train on."""
    text = given.first(
        "data_path", "train_file", "train_data_config_path", "train_data_path", "dataset", "dataset_name"
    )
    return {"data": text} if text else {}


def output(given: Given) -> Keys:
    """Where results go, and the name of the run."""
    keys: Keys = {}
    if folder := given.text("output_dir"):
        keys["output_dir"] = folder
    if name := given.text("run_name"):
        keys["model_unique"] = Path(name).name
    return keys


def report_to(given: Given) -> Keys:
    """The trackers. Here `none` is a value, not a missing one."""
    try:
        return {"report_to": trackers(given.values.get("report_to") or "none")}
    except ValueError as error:
        raise given.error("report_to", str(error)) from None


def no_limit_of_checkpoints(given: Given) -> Keys:
    """save_total_limit: none or a negative number keeps all."""
    limit = given.number("save_total_limit")
    return {} if limit is None else {"save_total_limit": max(0, int(limit))}
