"""Adapters of a run: their first weights, and the file that its checkpoints store instead of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig, load_adapter_config
from fm9g.config.train import TrainConfig
from fm9g.convert.adapters import read_adapter
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor
from fm9g.lora.adapter_file import EMBEDDING_WEIGHT, open_adapter
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.init import AdapterInit, trainable_ranks
from fm9g.lora.inject import inject_adapters
from fm9g.lora.quantize import quantize_layers
from fm9g.model.transformer import FM9G
from fm9g.train.new_tokens import GrownWeight

logger = logging.getLogger(__name__)


class AdapterTraining:
    """Exists on every rank; rank 0 alone reads and writes files."""

    def __init__(self, config: TrainConfig, model: FM9G) -> None:
        """Inserts adapters into a model on the meta device. Raises UserError if that is impossible."""
        self._train_config, self._vocab_size = config, model.config.vocab_size
        self._config = replace(
            AdapterConfig.from_train_config(config),
            ensure_weight_tying=bool(config.modules_to_save) and model.config.tie_word_embeddings,
        )
        if config.quantization != "none":
            quantize_layers(model.encoder.layers, config.quantization, config.double_quant)
        self._layers = inject_adapters(model, model.encoder.layers, self._config, config.lora_backend)
        self._adapter_init: AdapterInit | None = None

    def resolve_base(self, checkpoint: Checkpoint | None) -> Path:
        """Finds the base model. checkpoint: what the run resumes from; it names its base."""
        if self._train_config.pretrained_model:
            return Path(self._train_config.pretrained_model)
        if checkpoint is None:
            if self._train_config.adapter:  # which does not name its base, or one that is not here
                raise UserError(
                    f"adapter {self._train_config.adapter}: its base was not found under the name that it gives; "
                    "give the model that it was trained on as --pretrained_model"
                )
            # --resume auto, of a run that has no checkpoint
            raise UserError("lora_layer needs a pretrained_model: adapters are trained on the weights of a model")
        base = load_adapter_config(checkpoint.folder / ADAPTER_CONFIG).base
        if not Path(base).exists():
            raise UserError(f"{base}: the base of {checkpoint.folder} no longer exists; give --pretrained_model")
        return Path(base)

    def load_base(
        self,
        base: Path,
        weights: Mapping[str, LazyTensor | LazyConcat],
        grown: Mapping[str, LazyTensor | LazyConcat | GrownWeight],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Opens the weights that the adapters start from: those of the checkpoint, or of the configured adapter.

        Args:
            base: where the base model is.
            weights: its weights.
            grown: the same, with rows for new tokens.
            checkpoint: what the run resumes from.

        Raises:
            UserError: the adapters were trained on another base.
        """
        base_sha256 = base_fingerprint(weights, lambda name: weights[name].read())
        logger.info(f"base: {base}, SHA-256 {base_sha256[:16]}")
        saved = open_adapter(checkpoint.folder) if checkpoint else None
        if saved is None and self._train_config.adapter:
            saved = read_adapter(Path(self._train_config.adapter))
            logger.info(f"adapter: training starts from {saved.path} with a new optimizer, at step 0")
            if not saved.config.base_sha256:
                logger.warning(f"{saved.path}: does not say which base it is for; {base} is assumed")
        if saved and saved.config.base_sha256 not in ("", base_sha256):
            raise UserError(
                f"{base}: is not the base that the adapters of {saved.path} were trained on ({saved.config.base}); "
                "on any other base they are useless. Give that one as --pretrained_model"
            )
        if saved:
            saved.check_fits({name: weight.shape for name, weight in weights.items()}, str(base))
        rows = {**grown, **(saved.saved_modules if saved else {})}[EMBEDDING_WEIGHT].shape[0]
        if rows != self._vocab_size:
            raise UserError(
                f"{saved.path if saved else base}: has {rows} token ids, and the model of this run {self._vocab_size}; "
                "give the tokenizer that it was trained with as --tokenizer_path"
            )
        self._config = replace(self._config, base=str(base), base_sha256=base_sha256)
        self._adapter_init = AdapterInit(
            self._config,
            self._layers,
            lambda name: grown[name].read(),
            self._train_config.init_lora_weights,
            self._train_config.seed,
            saved.weights if saved else None,
        )

    def init_weight(self, name: str, weight: torch.Tensor) -> None:
        """Writes the first values of a weight into a tensor; on rank 0."""
        assert self._adapter_init is not None
        self._adapter_init.init_weight(name, weight)

    def weights(self, engine: Engine, ema: bool = False) -> Any:
        """The tensors of the adapter file, as the engine gathers them. ema: the running means of the weights."""
        trained = engine.ema_weights(trainable_only=True) if ema else engine.weights(trainable_only=True)
        return self._adapter_init.for_file(trained) if self._adapter_init else trained

    def trained_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained part of the tensors of an adapter file."""
        return {name: trainable_ranks(self._config, name, weight) for name, weight in weights.items()}

    def adapter_config_json(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return self._config.for_file().to_json()
