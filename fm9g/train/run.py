"""One run from its configuration: puts the rooms together, and nothing else does."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fm9g.checkpoint.folder import MODEL_CONFIG, Checkpoint, Snapshot, open_step, save_checkpoint, steps_in
from fm9g.checkpoint.weights import check_weights, read_weights
from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.loader import Loader
from fm9g.data.mixture import Mixture
from fm9g.data.position import merge_positions
from fm9g.engine.base import AdamW, Engine
from fm9g.engine.torch import TorchEngine, has_fast_bf16
from fm9g.errors import UserError
from fm9g.files import probe_writable
from fm9g.model.transformer import FM9G, is_width_scaled, weight_shapes
from fm9g.train.data import open_loader, open_mixture
from fm9g.train.interrupt import Interrupt
from fm9g.train.loop import TrainState, train
from fm9g.train.metrics import METRICS_FILE, Metrics


@dataclass(frozen=True)
class Result:
    """What a run left behind. checkpoint: None where it was told not to save. interrupted: by a signal."""

    step: int
    tokens: int
    seconds: float
    metrics_file: Path
    tensorboard: Path
    checkpoint: Path | None
    interrupted: bool


def run_training(run: RunConfig) -> Result:
    """Trains as configured and returns where everything is. Raises UserError."""
    config = run.train.value
    base, name = Path(config.output_dir), config.model_unique
    root = base / "checkpoints" / name
    tensorboard = base / "tensorboard" / f"{config.exp_group}{name}"
    log = base / "logs" / f"{config.exp_group}{name}"
    checkpoint = open_step(root, int(config.resume_ckpt)) if config.resume_ckpt else None
    if checkpoint is None and steps_in(root) and config.save and not config.overwrite:
        raise UserError(
            f"{root}: holds checkpoints of steps {', '.join(map(str, steps_in(root)))}; go on with --resume_ckpt, "
            "choose another --model_unique, or have them deleted with --overwrite true"
        )
    engine: Engine = TorchEngine(config.device, config.seed)
    mixture, notes = open_mixture(run)
    notes += _check_fit(config, run.model.value, mixture)
    notes += build_model(engine, config, run.model.value, checkpoint)
    tasks = [item.value.task_name for item in run.mixture]
    state = _restore(engine, config, checkpoint, tasks)
    for note in notes:
        print(f"note: {note}")
    print(_summary(run, engine, mixture))
    print(f"resuming from {checkpoint.folder}" if checkpoint else "starting at step 0")
    replaced = [] if checkpoint else steps_in(root)
    if config.save:
        probe_writable(root)
    position = checkpoint.position() if checkpoint else None
    if state.step >= min(config.stop_iters or config.train_iters, config.train_iters):
        print(f"note: nothing is left to do: step {state.step}, train_iters {config.train_iters}")
    with (
        open_loader(config, mixture, engine.rank, engine.world_size, position) as loader,
        Metrics(tensorboard, log, state.step, config.train_iters) as metrics,
        Interrupt() as interrupt,
    ):

        def save() -> None:
            if config.save:
                save_checkpoint(root, state.step, take_snapshot(run, engine, loader, mixture, state, tasks))
                while replaced:  # only now that the new run has something to show for itself
                    if (old := replaced.pop()) != state.step:
                        shutil.rmtree(root / str(old))

        for note in loader.notes:
            print(f"note: {note}")
        started, first = time.monotonic(), int(state.task_tokens.sum())
        train(config, tasks, engine, loader, metrics, state, save, lambda: interrupt.requested)
        seconds = time.monotonic() - started
        for reason, count in loader.skipped().items():
            print(f"note: {count} records were not trained on: {reason}")
    if state.step == 0 and not interrupt.requested:
        raise UserError("nothing was trained on: no record of the mixture gave a sample")
    return Result(
        step=state.step,
        tokens=int(state.task_tokens.sum()) - first,
        seconds=seconds,
        metrics_file=log / METRICS_FILE,
        tensorboard=tensorboard,
        checkpoint=root / str(state.step) if config.save and state.step else None,
        interrupted=interrupt.requested,
    )


def build_model(
    engine: Engine, config: TrainConfig, model_config: ModelConfig, checkpoint: Checkpoint | None
) -> list[str]:
    """Gives the engine a model with the weights of the checkpoint, of pretrained_model, or new ones.

    Returns what differs between the weights and the model, a line each, where strict_state_dict lets it pass.
    """
    flash = model_config.use_flash_attn and config.flash != "none"
    with torch.device("meta"):
        model = FM9G(replace(model_config, use_flash_attn=flash))
    given: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    if checkpoint is not None or config.pretrained_model:
        given = checkpoint.weights() if checkpoint else read_weights(Path(config.pretrained_model))
        where = str(checkpoint.weight_file if checkpoint else config.pretrained_model)
        notes = check_weights(
            given, weight_shapes(model_config), where, strict=config.strict_state_dict or checkpoint is not None
        )

    def fill(name: str, weight: torch.Tensor) -> None:
        if name in given:
            weight.copy_(given[name])
        else:
            model.init_weight(name, weight, config.seed)

    width = model_config.scale_width
    optimizer = AdamW(
        lr_scales={name: 1 / width if is_width_scaled(name) else 1.0 for name, _ in model.named_parameters()},
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    recompute = config.use_checkpoint or model_config.use_checkpoint
    layers = list(model.encoder.layers)[: config.grad_ckpt_num] if recompute else []
    dtype, dtype_notes = compute_dtype(model_config, engine.device)
    engine.prepare(model, fill, optimizer, dtype, layers)
    return notes + dtype_notes


def compute_dtype(model_config: ModelConfig, device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The precision of the computation: the model's half_type where the machine is fast at it, else fp32."""
    if model_config.dtype_name == "fp16":
        raise UserError(
            "half_type: fp16 needs loss scaling, which this version has not; --model.half_type bf16 or fp32"
        )
    if model_config.dtype_name == "fp32":
        return torch.float32, []
    if has_fast_bf16(device):
        return torch.bfloat16, []
    return torch.float32, [f"computing in fp32: bf16 is not faster on this {device.type}"]


def take_snapshot(
    run: RunConfig, engine: Engine, loader: Loader, mixture: Mixture, state: TrainState, tasks: list[str]
) -> Snapshot:
    """What a checkpoint of this moment holds. All ranks must take part."""
    tokens = sum(engine.gather(state.task_tokens))
    return Snapshot(
        weights=engine.weights(),
        optimizer=engine.optimizer_state(),
        random_state=engine.random_state(),
        position=merge_positions(engine.gather(loader.position())),
        counts={
            "iteration": state.step,
            "global_token_pass": int(np.sum(tokens)),
            "global_total_task_token": dict(zip(tasks, tokens.tolist())),  # type: ignore[union-attr]
        },
        documents={MODEL_CONFIG: run.model.value.to_json(), "run_config.json": run.to_json()},
        tokenizer_files=mixture.files_to_keep(),
    )


def _restore(engine: Engine, config: TrainConfig, checkpoint: Checkpoint | None, tasks: list[str]) -> TrainState:
    if checkpoint is None:
        return TrainState(0, np.zeros(len(tasks), np.int64))
    saved = checkpoint.rank_state(engine.rank)
    if not config.resume_no_optimze:
        engine.load_optimizer_state(saved["optimizer"])
    engine.load_random_state(saved["random_state"])
    counts = checkpoint.counts()
    trained = counts["global_total_task_token"]
    tokens = np.array([trained.get(task, 0) if engine.rank == 0 else 0 for task in tasks], np.int64)
    return TrainState(counts["iteration"], tokens)


def _summary(run: RunConfig, engine: Engine, mixture: Mixture) -> str:
    config, model = run.train.value, run.model.value
    weights = sum(shape.numel() for shape in weight_shapes(model).values())
    tokens = config.batch_size * config.max_length * config.grad_accum * engine.world_size
    data = ", ".join(f"{c.task_name} ({size} records)" for c, size in zip(mixture.configs, map(len, mixture.datasets)))
    dtype = str(compute_dtype(model, engine.device)[0]).removeprefix("torch.")
    return f"{weights:,} parameters, {dtype} on {engine.device}; {tokens} tokens a step; data: {data}"


def _check_fit(config: TrainConfig, model: ModelConfig, mixture: Mixture) -> list[str]:
    """Raises UserError where tokenizer and model do not fit; returns what may be meant, a line each."""
    if mixture.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer_path: {config.tokenizer_path} has {mixture.tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {model.vocab_size}; they do not belong together"
        )
    if config.max_length > model.max_length:
        return [f"max_length {config.max_length} is more than the model is made for ({model.max_length})"]
    return []
