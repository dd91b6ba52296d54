"""Which of a run's checkpoints to use, and the command that exports it."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.folder import best_step, last_step, steps_in
from fm9g.report.files import Run, number


@dataclass(frozen=True)
class Choice:
    """A checkpoint of a run. why: to use it, or not. loss: of its validation, None where it had none."""

    why: str
    step: int
    loss: float | None
    path: str
    command: str


@dataclass(frozen=True)
class Checkpoints:
    """What to use of a run: advice in a sentence or two, and the checkpoints it speaks of, the one to use first."""

    advice: str
    choices: list[Choice]


def checkpoints(run: Run) -> Checkpoints | None:
    """None where the run's configuration is not known, and so not where its checkpoints are."""
    name = _setting(run, "model_unique")
    if not isinstance(name, str) or not name:
        return None
    root = Path(os.path.relpath(run.folder.resolve().parent.parent / "checkpoints" / name))
    losses = {line["step"]: loss for line in run.metrics if (loss := number(line.get("Loss/val"))) is not None}
    best, last = best_step(root), last_step(root)
    if last is None:
        if steps_in(root):
            return Checkpoints(f"No checkpoint in {root} is whole; fm9g ckpt ls {root} says why.", [])
        told = ": save is false" if _setting(run, "save") is False else ""
        return Checkpoints(f"No checkpoint of this run is in {root}{told}.", [])

    def choice(why: str, step: int) -> Choice:
        folder = root / str(step)
        return Choice(why, step, losses.get(step), str(folder), _export(run, folder))

    if best is None:
        evaluated = "none of the checkpoints was evaluated" if losses else "the run had no validation data"
        advice = f"Use the last one: {evaluated}, so nothing says which is the best."
        return Checkpoints(advice, [choice("the last", last)])
    advice = "Use the best: its loss on text that it did not learn from is the lowest of all checkpoints."
    if losses and (lowest := min(losses, key=lambda step: losses[step])) != best and best in losses:
        advice += f" The loss was lower still at step {lowest:,} ({losses[lowest]:,.4f}), which has no checkpoint: let "
        advice += "save_iters be a divisor of eval_iters."
    if best == last:
        return Checkpoints(advice, [choice("the best, and the last", best)])
    return Checkpoints(advice, [choice("the best", best), choice("the last", last)])


def _export(run: Run, folder: Path) -> str:
    """The command that makes a Hugging Face folder of a checkpoint."""
    target = f"hf-{folder.parent.name}-{folder.name}"
    words = ["fm9g", "convert", str(folder), target]
    if _setting(run, "lora_layer"):
        words = ["fm9g", "lora", "merge", str(_setting(run, "pretrained_model") or "BASE"), str(folder), target]
    return shlex.join(words)


def _setting(run: Run, key: str) -> Any:
    return run.config.get("train", {}).get(key, {}).get("value")
