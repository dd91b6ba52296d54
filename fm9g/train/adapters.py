"""The adapters of a run: what they start from, and what its checkpoints hold in place of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.folder import Checkpoint
from fm9g.checkpoint.stored import Gathered, Stored
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig, load_adapter_config
from fm9g.config.train import TrainConfig
from fm9g.convert.adapters import read_adapter
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.lora.base import base_hash
from fm9g.lora.files import open_adapter
from fm9g.lora.inject import inject
from fm9g.lora.quantize import quantize_layers
from fm9g.lora.start import Start, trained_part


class Adapters:
    """One on every rank; rank 0 alone reads and writes files."""

    def __init__(self, config: TrainConfig, model: torch.nn.Module, layers: torch.nn.ModuleList) -> None:
        """Puts adapters into a model on the meta device. Raises UserError where that cannot be done."""
        self._train, self._config = config, AdapterConfig.of_run(config)
        if config.quantization != "none":
            quantize_layers(layers, config.quantization, config.double_quant)
        self._layers = inject(model, layers, self._config, config.lora_backend)
        self._start: Start | None = None

    def find_base(self, checkpoint: Checkpoint | None) -> Path:
        """Where the base is. checkpoint: what the run goes on from, which knows where it was."""
        if self._train.pretrained_model:
            return Path(self._train.pretrained_model)
        if checkpoint is None:
            if self._train.adapter:  # which does not name its base, or one that is not here
                raise UserError(
                    f"adapter {self._train.adapter}: its base is not here under the name that it gives; give the model "
                    "that it was trained on as --pretrained_model"
                )
            # --resume auto, of a run that has no checkpoint
            raise UserError("lora_layer needs a pretrained_model: adapters are trained on the weights of a model")
        base = load_adapter_config(checkpoint.folder / ADAPTER_CONFIG).base
        if not Path(base).exists():
            raise UserError(f"{base}: the base of {checkpoint.folder} is not there any more; give --pretrained_model")
        return Path(base)

    def start(self, base: Path, weights: Mapping[str, Stored | Gathered], checkpoint: Checkpoint | None) -> list[str]:
        """Takes the weights of the base, and those that the adapters have already: the checkpoint's, or those of the
        adapter that the run starts from. Returns what there is to know.

        Raises UserError if these were trained on another base.
        """
        found = base_hash(weights, lambda name: weights[name].read())
        notes = [f"base: {base}, SHA-256 {found[:16]}"]
        saved = open_adapter(checkpoint.folder) if checkpoint else None
        if saved is None and self._train.adapter:
            saved = read_adapter(Path(self._train.adapter))
            notes.append(f"adapter: training starts from {saved.where} with a new optimizer, at step 0")
            if not saved.config.base_sha256:
                notes.append(f"{saved.where}: does not say which base it is for; {base} is taken for it")
        if saved and saved.config.base_sha256 not in ("", found):
            raise UserError(
                f"{base}: is not the base that the adapters of {saved.where} were trained on ({saved.config.base}); "
                "with another one they mean nothing. Give that one as --pretrained_model"
            )
        self._config = replace(self._config, base=str(base), base_sha256=found)
        self._start = Start(
            self._config,
            self._layers,
            lambda name: weights[name].read(),
            self._train.init_lora_weights,
            self._train.seed,
            saved.weights if saved else None,
        )
        return notes

    def fill(self, name: str, weight: torch.Tensor) -> None:
        """Writes the values of the weight of that name into a tensor, on rank 0."""
        assert self._start is not None
        self._start.fill(name, weight)

    def weights(self, engine: Engine, means: bool = False) -> Any:
        """The content of the adapter's file, as an engine gives it. means: the running means of weights."""
        trained = engine.mean_weights(trained=True) if means else engine.weights(trained=True)
        return self._start.in_file(trained) if self._start else trained

    def from_file(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is trained, of what the adapter's file holds."""
        return {name: trained_part(self._config, name, weight) for name, weight in weights.items()}

    def document(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return self._config.in_file().to_json()
