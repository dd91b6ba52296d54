"""Advises which checkpoint of a run to use, and how to export it."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.steps import best_step, last_step, list_steps
from fm9g.report.files import Run
from fm9g.run_files import checkpoints_dir, finite_or_none


@dataclass(frozen=True)
class CheckpointChoice:
    """A checkpoint to use. reason: why. loss: validation loss, None if it has none. command: exports it."""

    reason: str
    step: int
    loss: float | None
    path: str
    command: str


@dataclass(frozen=True)
class CheckpointAdvice:
    """advice: a sentence or two. choices: the checkpoints it is about, the one to use first."""

    advice: str
    choices: list[CheckpointChoice]


def advise_checkpoints(run: Run) -> CheckpointAdvice | None:
    """Advice for a run; None if its configuration, and so the place of its checkpoints, is unknown."""
    name = _config_value(run, "model_unique")
    if not isinstance(name, str) or not name:
        return None
    checkpoint_dir = Path(os.path.relpath(checkpoints_dir(run.folder.resolve().parent.parent) / name))
    losses = {line["step"]: loss for line in run.metrics if (loss := finite_or_none(line.get("Loss/val"))) is not None}
    best, last = best_step(checkpoint_dir), last_step(checkpoint_dir)
    if last is None:
        if list_steps(checkpoint_dir):
            return CheckpointAdvice(
                f"No checkpoint in {checkpoint_dir} is complete; fm9g ckpt ls {checkpoint_dir} says why.", []
            )
        reason = ": save is false" if _config_value(run, "save") is False else ""
        return CheckpointAdvice(f"No checkpoint of this run is in {checkpoint_dir}{reason}.", [])

    def choice(reason: str, step: int) -> CheckpointChoice:
        folder = checkpoint_dir / str(step)
        return CheckpointChoice(reason, step, losses.get(step), str(folder), _export_command(run, folder))

    if best is None:
        evaluated = "none of the checkpoints was evaluated" if losses else "the run had no validation data"
        advice = f"Use the last one: {evaluated}, so nothing says which is the best."
        return CheckpointAdvice(advice, [choice("the last", last)])
    advice = "Use the best: its loss on text that was not trained on is the lowest of all checkpoints."
    if losses and (lowest := min(losses, key=lambda step: losses[step])) != best and best in losses:
        advice += f" The loss was lower still at step {lowest:,} ({losses[lowest]:,.4f}), which has no checkpoint: let "
        advice += "save_iters be a divisor of eval_iters."
    if best == last:
        return CheckpointAdvice(advice, [choice("the best, and the last", best)])
    return CheckpointAdvice(advice, [choice("the best", best), choice("the last", last)])


def _export_command(run: Run, folder: Path) -> str:
    """The command that exports a checkpoint as a Hugging Face folder."""
    target = f"hf-{folder.parent.name}-{folder.name}"
    words = ["fm9g", "convert", str(folder), target]
    if _config_value(run, "lora_layer"):
        words = ["fm9g", "lora", "merge", str(_config_value(run, "pretrained_model") or "BASE"), str(folder), target]
    return shlex.join(words)


def _config_value(run: Run, key: str) -> Any:
    return run.config.get("train", {}).get(key, {}).get("value")
