"""What a LoRA adapter is: the keys of `adapter_config.json`, which lies beside its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fm9g.config.fields import key_of, option
from fm9g.config.load import ConfigSource, build, read_object
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterConfig:
    """Keys are PEFT's where PEFT has them. What the adapter adds to a linear layer is `scaling` * B A x."""

    r: int = option(help="rank of A and B in the file", minimum=1, maximum=2**20)
    alpha: float = option(help="the numerator of the scaling", key="lora_alpha", exclusiveMinimum=0, maximum=1e7)
    layers: list[str] = option(help="names of the linear layers", key="target_modules", minItems=1)
    dropout: float = option(
        0.0, help="of the adapters' inputs, in training", key="lora_dropout", minimum=0, exclusiveMaximum=1
    )
    rslora: bool = option(False, help="scaling is alpha / sqrt(r), not alpha / r", key="use_rslora")
    dora: bool = option(False, help="the file holds the lengths of the rows of the merged weight", key="use_dora")
    pissa: bool = option(
        False,
        help="the last half of the ranks takes out what the first half began with, so that the base is the whole one",
    )
    base: str = option("", help="where the base was when the adapter was trained", key="base_model_name_or_path")
    base_sha256: str = option("", help="of the base's weights: fm9g.lora.base_fingerprint; empty: not known")
    made_from: list[str] = option([], help="the adapters that it is the weighted sum of")

    def __post_init__(self) -> None:
        if self.dora and self.pissa:
            raise UserError("use_dora and pissa are both true, which no adapter of ours is")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @classmethod
    def from_train_config(cls, train: TrainConfig) -> AdapterConfig:
        """Of the adapters that a run trains."""
        return cls(
            r=train.lora_r,
            alpha=train.lora_alpha,
            layers=train.lora_layer,
            dropout=train.lora_dropout,
            rslora=train.use_rslora,
            dora=train.use_dora,
            pissa=train.init_lora_weights != "default",
        )

    def for_file(self) -> AdapterConfig:
        """Of the file, from that of the layers that are trained: with PiSSA it has twice the ranks."""
        if not self.pissa:
            return self
        rank = 2 * self.r
        return replace(self, r=rank, alpha=self.scaling * (math.sqrt(rank) if self.rslora else rank))

    def to_json(self) -> dict[str, Any]:
        return {key_of(f): getattr(self, f.name) for f in fields(self)}


def load_adapter_config(path: Path) -> AdapterConfig:
    """Raises UserError for a file that is missing or not one of ours."""
    return build(AdapterConfig, [ConfigSource(str(path), read_object(path))]).value
