"""Chooses the engine of a run, and gives it a model with its first weights and an optimizer."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST
from fm9g.checkpoint.weight_check import check_weights
from fm9g.config.model import ModelConfig, architecture_of, values_differ
from fm9g.config.resolved import DeviceFacts, resolve_dtype, resolve_engine
from fm9g.config.train import TrainConfig
from fm9g.convert.hf_reader import open_hf_folder
from fm9g.convert.source import open_pt_weights
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.engine.base import Engine, ParallelConfig, WeightInit
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine, has_fast_bf16
from fm9g.engine.gradients import DynamicLossScaler
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor
from fm9g.io.pt_file import open_pt
from fm9g.lora.inject import A, B, canonical_name
from fm9g.model.counts import trained_layers
from fm9g.model.loss import LossConfig
from fm9g.model.transformer import FM9G, is_mup_scaled, is_norm_or_bias, weight_shapes
from fm9g.path_kind import CHECKPOINT, MODEL, WEIGHTS, check_kind
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.new_tokens import Weights, base_config, grow_weights, warn_if_frozen

logger = logging.getLogger(__name__)

LazyWeights = Mapping[str, LazyTensor | LazyConcat]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device_facts(device: torch.device) -> DeviceFacts:
    """Asks torch about a device."""
    return DeviceFacts(device.type == "cuda", has_fast_bf16(device), find_spec("bmtrain") is not None)


def engine_name(config: TrainConfig) -> str:
    """The engine of a run on this machine: bmtrain or torch."""
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    return resolve_engine(config, DeviceFacts(on_gpu, has_bmtrain=find_spec("bmtrain") is not None))


def make_engine(config: TrainConfig, dist_context: DistContext) -> Engine:
    """Raises UserError if the engine of the configuration cannot work here."""
    if engine_name(config) == "torch":
        return FSDPEngine(dist_context, config.seed)
    from fm9g.engine.bmtrain import BMTrainEngine

    return BMTrainEngine(dist_context, config.seed)


def setup_model_and_optimizer(
    engine: Engine,
    config: TrainConfig,
    model_config: ModelConfig,
    checkpoint: Checkpoint | None,
    tokenizer: Tokenizer | None = None,
) -> AdapterTraining | None:
    """Gives the engine a model with the weights of the checkpoint, of pretrained_model, or random ones.

    Args:
        checkpoint: what the run resumes from; on rank 0, which alone reads weights.
        tokenizer: whose new tokens get rows that pretrained_model does not have; None: there are none.

    Returns:
        The adapters that are trained instead of the model; None: the model is trained.
    """
    if config.offload_optimizer and engine.device.type == "cpu":
        raise UserError("offload_optimizer: the weights are in the host's memory already; it is for GPUs")
    model = _build_meta_model(config, model_config)
    is_rank_zero = engine.dist_context.rank == 0
    adapter_training = None
    if config.lora_layer:
        adapter_training = AdapterTraining(config, model)
        if is_rank_zero:
            base = adapter_training.resolve_base(checkpoint)
            weights = _load_weights(base, model_config, strict=True, may_grow=bool(config.modules_to_save))
            adapter_training.load_base(base, weights, grow_weights(weights, model_config, tokenizer, base), checkpoint)
        init_weight: WeightInit = adapter_training.init_weight
    else:
        _freeze(model, config)
        warn_if_frozen(model, tokenizer)
        pretrained = _choose_weights(config, model_config, checkpoint, tokenizer) if is_rank_zero else {}
        init_weight = _weight_init(model, pretrained, config.seed)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    dtype = _compute_dtype(model_config, engine.device)
    _log_trainable(parameters, weight_shapes(model_config))
    engine.prepare(
        model,
        model.encoder.layers,
        init_weight,
        _optimizer_config(config, model_config, parameters),
        _parallel_config(config, dtype, has_adapters=adapter_training is not None),
        DynamicLossScaler(config.loss_scale, config.loss_scale_steps)
        if dtype == torch.float16
        else DynamicLossScaler(),
        canonical_name,
    )
    return adapter_training


def _build_meta_model(config: TrainConfig, model_config: ModelConfig) -> FM9G:
    """The model on the meta device, without values."""
    use_flash = model_config.use_flash_attn and config.flash != "none"
    loss_config = LossConfig(config.label_smoothing, config.z_loss)
    with torch.device("meta"):
        return FM9G(replace(model_config, use_flash_attn=use_flash), loss_config, config.neftune_alpha)


def _choose_weights(
    config: TrainConfig, model_config: ModelConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer | None
) -> Weights:
    """The weights to start from; empty: random ones."""
    if checkpoint is not None:
        return _load_weights(checkpoint.weight_file, model_config, strict=True)
    if config.pretrained_model:
        source = Path(config.pretrained_model)
        logger.info(f"weights: {source}")
        may_grow = tokenizer is not None and bool(tokenizer.new_ids)
        weights = _load_weights(source, model_config, config.strict_state_dict, may_grow)
        return grow_weights(weights, model_config, tokenizer, source)
    logger.info("weights: random, since pretrained_model is empty")
    return {}


def _weight_init(model: FM9G, pretrained: Weights, seed: int) -> WeightInit:
    def init_weight(name: str, weight: torch.Tensor) -> None:
        if name in pretrained:
            weight.copy_(pretrained[name].read())
        else:
            model.init_weight(name, weight, seed)

    return init_weight


def _optimizer_config(
    config: TrainConfig, model_config: ModelConfig, weights: Mapping[str, torch.Tensor]
) -> OptimizerConfig:
    """Args: weights: all of them by name, adapters included; their shapes count."""
    mup_width = model_config.mup_width if model_config.mup_lr else 1.0
    if model_config.mup_width != 1.0 and not config.lora_layer:
        logger.info(_lr_summary(model_config))

    def lr_scale(name: str) -> float:
        if name.endswith(B):
            return config.loraplus_lr_ratio
        return 1 / mup_width if is_mup_scaled(name) else 1.0

    return OptimizerConfig(
        lr_scales={name: lr_scale(name) for name in weights},
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        name=config.optimizer,
        muon_params=frozenset(name for name in weights if is_mup_scaled(name) or name.endswith((A, B))),
        momentum=config.sgd_momentum if config.optimizer == "sgd" else config.muon_momentum,
        ema_decay=config.ema_decay,
        no_decay=frozenset() if config.decay_norm_and_bias else frozenset(filter(is_norm_or_bias, weights)),
    )


def _parallel_config(config: TrainConfig, dtype: torch.dtype, has_adapters: bool) -> ParallelConfig:
    return ParallelConfig(
        dtype=dtype,
        zero_level=config.zero_level,
        checkpointing=config.checkpointing,
        checkpointed_layers=config.grad_ckpt_num,
        tp_size=config.tp_size,
        sequence_parallel=config.sequence_parallel,
        offload=config.offload_optimizer,
        frozen_in_compute_dtype=has_adapters,
    )


def _compute_dtype(model_config: ModelConfig, device: torch.device) -> torch.dtype:
    name = resolve_dtype(model_config, device_facts(device))
    if name != model_config.dtype_name:
        logger.info(f"computing in fp32: {model_config.dtype_name} is not faster on this {device.type}")
    return _DTYPES[name]


def _lr_summary(config: ModelConfig) -> str:
    """Which learning rate the linear layers of a width-scaled model have."""
    if config.mup_lr:
        return f"lr of linear layers: lr / {config.mup_width:g} (muP: dim_model / dim_model_base; model.mup_lr is true)"
    return f"lr of linear layers: lr (model.mup_lr is false; true divides it by {config.mup_width:g}, as muP does)"


def _freeze(model: FM9G, config: TrainConfig) -> None:
    """Excludes weights from training: those outside trainable_layers, and those whose names match a pattern."""
    weights = dict(model.named_parameters())
    if config.trainable_layers:
        layers = trained_layers(len(model.encoder.layers), config.trainable_layers)
        trained = tuple(f"encoder.layers.{layer}." for layer in layers)
        for name, weight in weights.items():
            weight.requires_grad_(name.startswith(trained))
    for pattern in filter(None, map(str.strip, config.freeze.split(","))):
        matching = fnmatch.filter(weights, pattern)
        if not matching:
            raise UserError(
                f"freeze: {pattern!r} matches no weight; names look like input_embedding.weight and "
                "encoder.layers.0.ffn.ffn.w_out.weight, and a pattern matches all of a name"
            )
        for name in matching:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise UserError("freeze: nothing is left to train")


def _log_trainable(parameters: dict[str, torch.nn.Parameter], model: dict[str, torch.Size]) -> None:
    """Logs how many weights are trained, unless it is all of them. model: the shapes of the model without adapters."""
    trained = {name: weight.numel() for name, weight in parameters.items() if weight.requires_grad}
    added = sum(count for name, count in trained.items() if name not in model)
    count, total = sum(trained.values()), sum(shape.numel() for shape in model.values()) + added
    if count < total:
        logger.info(f"trained: {count:,} of {total:,} parameters ({count / total:.2%})")


def _load_weights(path: Path, model_config: ModelConfig, strict: bool, may_grow: bool = False) -> LazyWeights:
    """Opens the weights of a .pt file, a checkpoint or a Hugging Face folder.

    Args:
        strict: raise UserError if weights are missing or unknown; False: log a warning.
        may_grow: they may be for fewer token ids than the model's.
    """
    weights = _open_pretrained(path, model_config, may_grow)
    try:
        shapes = weight_shapes(base_config(model_config, weights) if may_grow else model_config)
        mismatches = check_weights(weights, shapes, str(path), strict)
    except UserError as error:
        config_file = path.with_suffix(".json")
        if path.suffix == ".pt" and config_file.is_file():
            hint = f"\n{config_file} describes the model: --config {config_file}"
            hint += ', or args["config"] in the guide\'s scripts'
            raise UserError(f"{error}{hint}") from None
        raise
    for mismatch in mismatches:
        logger.warning(mismatch)
    return weights


def _open_pretrained(path: Path, model_config: ModelConfig, may_grow: bool) -> LazyWeights:
    check_kind(path, CHECKPOINT, WEIGHTS, MODEL)
    if not path.exists():
        hint = "; `python hgface_2_bmtrain.py` or `fm9g convert FOLDER FILE.pt` makes one" * (path.suffix == ".pt")
        raise UserError(f"pretrained_model: {path}: no such file or folder{hint}")
    if not path.is_dir():
        return open_pt_weights(path)
    if (path / MANIFEST).is_file():
        return open_pt(Checkpoint(path, needs_optimizer=False).weight_file)
    if not (path / "config.json").is_file():
        files = ", ".join(str(file) for file in sorted(path.glob("*.pt"))[:3])
        hint = f"; it holds {files}" if files else ""
        raise UserError(f"pretrained_model: {path}: neither a checkpoint nor a Hugging Face folder{hint}")
    config, weights = open_hf_folder(path)
    if may_grow:
        model_config = base_config(model_config, weights)
    run_values, checkpoint_values = (architecture_of(c) for c in (model_config, config))
    if mismatches := [
        f"{key} is {checkpoint_values[key]!r}, the run's {run_values[key]!r}"
        for key in run_values
        if values_differ(run_values[key], checkpoint_values[key])
    ]:
        raise UserError(f"pretrained_model: {path / 'config.json'} describes another model: {'; '.join(mismatches)}")
    return weights
