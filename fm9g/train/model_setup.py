"""The engine of a run, and its model on it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import MANIFEST, Checkpoint
from fm9g.config.model import ModelConfig, architecture_of, values_differ
from fm9g.config.train import TrainConfig
from fm9g.convert.hf_reader import open_hf_folder, open_pt_weights
from fm9g.engine.base import DynamicLossScaler, Engine, ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine, has_fast_bf16
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor, open_pt
from fm9g.io.path_kind import CHECKPOINT, MODEL, WEIGHTS, check_kind
from fm9g.io.weights import check_weights
from fm9g.lora.inject import A, B, canonical_name
from fm9g.model.loss import LossConfig
from fm9g.model.transformer import FM9G, is_mup_scaled, weight_shapes
from fm9g.train.adapter_training import AdapterTraining

Weights = Mapping[str, LazyTensor | LazyConcat]


def engine_name(config: TrainConfig) -> str:
    """bmtrain or torch, where the configuration leaves it open: bmtrain where there is a GPU and the package."""
    if config.engine != "auto":
        return config.engine
    fits = torch.cuda.is_available() and config.device != "cpu" and config.tp_size == 1 and config.zero_level
    return "bmtrain" if fits and find_spec("bmtrain") else "torch"


def make_engine(config: TrainConfig, dist_context: DistContext) -> Engine:
    """The engine that the configuration names. Raises UserError where it cannot work here."""
    if engine_name(config) == "torch":
        return FSDPEngine(dist_context, config.seed)
    from fm9g.engine.bmtrain import BMTrainEngine

    return BMTrainEngine(dist_context, config.seed)


def setup_model_and_optimizer(
    engine: Engine, config: TrainConfig, model_config: ModelConfig, checkpoint: Checkpoint | None
) -> tuple[list[str], AdapterTraining | None]:
    """Gives the engine a model with the weights of the checkpoint, of pretrained_model, or new ones.

    checkpoint: on rank 0, which alone reads weights. Returns what there is to know of the weights, a line each, and the
    adapters that are trained in place of the model.
    """
    flash = model_config.use_flash_attn and config.flash != "none"
    loss_config = LossConfig(config.label_smoothing, config.z_loss)
    with torch.device("meta"):
        model = FM9G(replace(model_config, use_flash_attn=flash), loss_config, config.neftune_alpha)
    is_rank_zero, adapter_training = engine.dist_context.rank == 0, None
    pretrained: Weights = {}
    notes: list[str] = []
    if config.lora_layer:
        adapter_training = AdapterTraining(config, model, model.encoder.layers)
        if is_rank_zero:
            base = adapter_training.resolve_base(checkpoint)
            pretrained, notes = _load_weights(base, model_config, strict=True)
            notes += adapter_training.load_base(base, pretrained, checkpoint)
    else:
        _freeze(model, config.freeze)
        if is_rank_zero and (checkpoint is not None or config.pretrained_model):
            source = checkpoint.weight_file if checkpoint else Path(config.pretrained_model)
            strict = config.strict_state_dict or checkpoint is not None
            pretrained, mismatches = _load_weights(source, model_config, strict)
            notes += [] if checkpoint else [f"weights: {source}"]
            notes += mismatches
        elif is_rank_zero:
            notes.append("weights: new ones, at random; pretrained_model is empty")

    def init_weight(name: str, weight: torch.Tensor) -> None:
        if adapter_training:
            adapter_training.init_weight(name, weight)
        elif name in pretrained:
            weight.copy_(pretrained[name].read())
        else:
            model.init_weight(name, weight, config.seed)

    width = model_config.mup_width if model_config.mup_lr else 1.0
    if model_config.mup_width != 1.0 and not config.lora_layer:
        notes.append(_lr_summary(model_config))
    weights = {canonical_name(name): weight for name, weight in model.named_parameters()}
    lora_b_ratio = config.loraplus_lr_ratio
    optimizer_config = OptimizerConfig(
        lr_scales={
            name: lora_b_ratio if name.endswith(B) else 1 / width if is_mup_scaled(name) else 1.0 for name in weights
        },
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        name=config.optimizer,
        muon_params=frozenset(name for name in weights if is_mup_scaled(name) or name.endswith((A, B))),
        momentum=config.muon_momentum,
        ema_decay=config.ema_decay,
    )
    dtype, dtype_notes = compute_dtype(model_config, engine.device)
    if config.offload_optimizer and engine.device.type == "cpu":
        raise UserError("offload_optimizer: the weights are in the host's memory already; it is for GPUs")
    if config.tp_size > 1:
        if model_config.qk_norm:  # each process would have the gradients of its own heads alone
            raise UserError(f"tp_size {config.tp_size} does not go with a model whose qk_norm is true; ZeRO shards it")
        for key, heads in (("num_heads", model_config.num_heads), ("num_kv_heads", model_config.num_kv_heads)):
            if heads % config.tp_size:
                raise UserError(f"tp_size {config.tp_size} does not divide the model's {key}, {heads}")
    parallel_config = ParallelConfig(
        dtype=dtype,
        zero_level=config.zero_level,
        checkpointing=config.checkpointing,
        checkpointed_layers=config.grad_ckpt_num,
        tp_size=config.tp_size,
        sequence_parallel=config.sequence_parallel,
        offload=config.offload_optimizer,
        frozen_in_compute_dtype=adapter_training is not None,
    )
    loss_scaler = (
        DynamicLossScaler(config.loss_scale, config.loss_scale_steps) if dtype == torch.float16 else DynamicLossScaler()
    )
    engine.prepare(
        model, model.encoder.layers, init_weight, optimizer_config, parallel_config, loss_scaler, canonical_name
    )
    trainable = _trainable_summary(weights, weight_shapes(model_config))
    return notes + trainable + dtype_notes, adapter_training


def _lr_summary(config: ModelConfig) -> str:
    """A line on which of two learning rates the linear layers of a width-scaled model have."""
    if config.mup_lr:
        return f"lr of linear layers: lr / {config.mup_width:g} (muP: dim_model / dim_model_base; model.mup_lr is true)"
    return f"lr of linear layers: lr (model.mup_lr is false; true divides it by {config.mup_width:g}, as muP does)"


def _freeze(model: FM9G, patterns: str) -> None:
    """Has weights whose name matches a pattern stay as they are. Raises UserError."""
    weights = dict(model.named_parameters())
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        found = fnmatch.filter(weights, pattern)
        if not found:
            raise UserError(
                f"freeze: {pattern!r} matches no weight; names are such as input_embedding.weight and "
                "encoder.layers.0.ffn.ffn.w_out.weight, and a pattern matches all of a name"
            )
        for name in found:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise UserError("freeze: nothing is left to train")


def _trainable_summary(weights: dict[str, torch.nn.Parameter], model: dict[str, torch.Size]) -> list[str]:
    """A line on how much is trained, where that is not all. model: the shapes of the model without adapters."""
    trained = {name: weight.numel() for name, weight in weights.items() if weight.requires_grad}
    added = sum(count for name, count in trained.items() if name not in model)
    count, total = sum(trained.values()), sum(shape.numel() for shape in model.values()) + added
    return [f"trained: {count:,} of {total:,} parameters ({count / total:.2%})"] if count < total else []


def _load_weights(path: Path, model_config: ModelConfig, strict: bool) -> tuple[Weights, list[str]]:
    """The weights of a .pt file, a checkpoint or a Hugging Face folder, and how they differ from the model's, a line
    each, where `strict` lets it pass."""
    weights = _open_pretrained(path, model_config)
    try:
        return weights, check_weights(weights, weight_shapes(model_config), str(path), strict)
    except UserError as error:
        beside = path.with_suffix(".json")
        if path.suffix == ".pt" and beside.is_file():
            hint = f'\n{beside} describes the model: --config {beside}, or args["config"] in the guide\'s scripts'
            raise UserError(f"{error}{hint}") from None
        raise


def _open_pretrained(path: Path, model_config: ModelConfig) -> Weights:
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
    ours, theirs = (architecture_of(c) for c in (model_config, config))
    if mismatches := [
        f"{key} is {theirs[key]!r}, the run's {ours[key]!r}" for key in ours if values_differ(ours[key], theirs[key])
    ]:
        raise UserError(f"pretrained_model: {path / 'config.json'} describes another model: {'; '.join(mismatches)}")
    return weights


def compute_dtype(model_config: ModelConfig, device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The precision of the computation: the model's half_type where the machine is fast at it, else fp32."""
    if model_config.dtype_name == "fp32":
        return torch.float32, []
    if model_config.dtype_name == "fp16" and device.type == "cuda":
        return torch.float16, []
    if model_config.dtype_name == "bf16" and has_fast_bf16(device):
        return torch.bfloat16, []
    return torch.float32, [f"computing in fp32: {model_config.dtype_name} is not faster on this {device.type}"]
