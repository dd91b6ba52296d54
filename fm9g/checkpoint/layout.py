"""Names of the files and folders of checkpoints.

ROOT/                               all checkpoints of a run
    100/                            the checkpoint of step 100
        fm9g_live_checkpoint-100.pt etc.
        manifest.json               written last
    200.abandoned/                  an abandoned checkpoint: no run resumes from it (200.left in older versions)
"""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
LOADER_STATE = "data_position.json"
MODEL_CONFIG = "config.json"
RUN_CONFIG = "run_config.json"
TOKENIZER = "tokenizer"  # a folder
BEST, LAST = "best", "last"  # names of checkpoints in commands
TENSOR_KINDS = ("weights", "optimizer", "ema")
_SUFFIXES = {"weights": ".pt", "optimizer": ".rank-0.opt", "ema": ".ema.pt", "trainer_state": ".log_ckpt"}
_ABANDONED_SUFFIXES = (".abandoned", ".left")  # the current one first


def file_name(step: int | str, kind: str) -> str:
    """The name of a checkpoint's file. kind: one of TENSOR_KINDS, or trainer_state."""
    return f"fm9g_live_checkpoint-{step}{_SUFFIXES[kind]}"


def is_step_name(name: str) -> bool:
    """Whether a folder of that name can be a checkpoint that a run resumes from."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def abandoned_paths(root: Path, step: int) -> list[Path]:
    """Where an abandoned checkpoint of a step may be: first where it is put today, then where older versions put it."""
    return [root / f"{step}{suffix}" for suffix in _ABANDONED_SUFFIXES]
