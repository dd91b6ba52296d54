"""Kind and size of a LoRA adapter: the keys of `adapter_config.json`, which is beside its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fm9g.config.fields import key_of, option
from fm9g.config.load import ConfigSource, build
from fm9g.config.train import TrainConfig
from fm9g.config.train_rules import canonical_modules
from fm9g.errors import UserError
from fm9g.io.json_file import read_object

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterConfig:
    """Keys are those of PEFT as far as PEFT has them. The adapter adds `scaling` * B A x to a linear layer."""

    r: int = option(help="rank of A and B in the file", minimum=1, maximum=2**20)
    alpha: float = option(help="numerator of the scale alpha / r", key="lora_alpha", exclusiveMinimum=0, maximum=1e7)
    layers: list[str] = option(help="names of the linear layers with an adapter", key="target_modules", minItems=1)
    dropout: float = option(
        0.0,
        help="dropout probability of the adapters' inputs in training; 0: none",
        key="lora_dropout",
        minimum=0,
        exclusiveMaximum=1,
    )
    rslora: bool = option(False, help="the scale is alpha / sqrt(r) instead of alpha / r", key="use_rslora")
    dora: bool = option(False, help="the file also holds the length of each row of the merged weight", key="use_dora")
    pissa: bool = option(
        False,
        help="the second half of the ranks subtracts the initial values of the first half, so the base keeps "
        "its original weights",
    )
    modules_to_save: list[str] = option(
        [], help="modules whose complete weights are in the file, in place of the base's: input_embedding, lm_head"
    )
    ensure_weight_tying: bool = option(
        False, help="input_embedding in modules_to_save is the weight of the output layer, too"
    )
    base: str = option("", help="path of the base model during training", key="base_model_name_or_path")
    base_sha256: str = option("", help="SHA-256 of the base's weights, by fm9g.lora.base_fingerprint; empty: unknown")
    made_from: list[str] = option([], help="adapters of which this one is the weighted sum; empty: it was trained")

    def __post_init__(self) -> None:
        if self.dora and self.pissa:
            raise UserError("use_dora and pissa are both true, which fm9g does not support")
        object.__setattr__(self, "modules_to_save", canonical_modules(self.modules_to_save))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @classmethod
    def from_train_config(cls, train: TrainConfig) -> AdapterConfig:
        """The configuration of the adapters that a run trains."""
        return cls(
            r=train.lora_r,
            alpha=train.lora_alpha,
            layers=train.lora_layer,
            dropout=train.lora_dropout,
            rslora=train.use_rslora,
            dora=train.use_dora,
            pissa=train.init_lora_weights != "default",
            modules_to_save=train.modules_to_save,
        )

    def for_file(self) -> AdapterConfig:
        """The configuration of the file: with PiSSA it has twice the rank of the trained layers."""
        if not self.pissa:
            return self
        rank = 2 * self.r
        return replace(self, r=rank, alpha=self.scaling * (math.sqrt(rank) if self.rslora else rank))

    def to_json(self) -> dict[str, Any]:
        return {key_of(f): getattr(self, f.name) for f in fields(self)}


def load_adapter_config(path: Path) -> AdapterConfig:
    """Raises UserError for a file that is missing or was not written by fm9g."""
    return build(AdapterConfig, [ConfigSource(str(path), read_object(path))])
