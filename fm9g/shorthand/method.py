"""What `method` stands for, and the defaults of a run that is described by `model` and `data`."""

from __future__ import annotations

from typing import Any

from fm9g.config.load import ConfigSource
from fm9g.config.model import ModelConfig
from fm9g.shorthand.model import ModelDescription

FULL, LORA, QLORA, FREEZE = "full", "lora", "qlora", "freeze"
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    FULL: {"lr": 2e-5},
    LORA: {"lr": 1e-4, "lora_layer": ["all"]},
    QLORA: {"lr": 1e-4, "lora_layer": ["all"], "quantization": "nf4"},
    FREEZE: {"lr": 2e-5, "trainable_layers": 2},
}
_MAX_LENGTH = 2048  # tokens; LLaMA-Factory and ms-swift start with it, too
_EPOCHS, _WARMUP_RATIO = 1.0, 0.05


def method_source(method: str, given: set[str], lora_layers: tuple[str, ...] = ()) -> ConfigSource:
    """The defaults of a method, for keys that are not given.

    Args:
        given: names of the keys that the user gave. Adapter layers that come with an adapter are not chosen anew.
        lora_layers: those that the model's registration names; empty: all.
    """
    values = {key: value for key, value in METHOD_DEFAULTS[method].items() if key not in given}
    if lora_layers and "lora_layer" in values:
        values["lora_layer"] = list(lora_layers)
    if "adapter" in given:
        values.pop("lora_layer", None)
    return ConfigSource(f"method {method}", values)


def finetuning_source(described: ModelDescription, model: ModelConfig, method: str, given: set[str]) -> ConfigSource:
    """The defaults of a run that starts from a trained model: its length, its warmup and its name."""
    values: dict[str, Any] = {
        "max_length": min(_MAX_LENGTH, model.max_length),
        "model_unique": f"{described.name}-{method}",
    }
    if not given & {"epochs", "train_iters"}:
        values["epochs"] = _EPOCHS
    if not given & {"warmup_iters", "warmup_ratio"}:
        values["warmup_ratio"] = _WARMUP_RATIO
    return ConfigSource("default with model", {key: value for key, value in values.items() if key not in given})
