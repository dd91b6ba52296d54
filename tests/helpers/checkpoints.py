"""Small checkpoints below data/checkpoints of the current folder."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers.common import small_model

from fm9g.checkpoint.find import CHECKPOINTS_DIR
from fm9g.checkpoint.layout import MANIFEST
from fm9g.checkpoint.save import Snapshot, save_checkpoint
from fm9g.model.transformer import weight_shapes

MODEL = small_model(hidden_size=8, head_dim=4, intermediate_size=12, vocab_size=16)


POSITION = {
    "fingerprint": {"datasets": {"few": {"records": 50}, "many": {"records": 150}}},
    "streams": {
        "0": {"begun": [60, 20], "waiting": [[0, 1, 0]], "open": [[], [[3, 1]]], "skipped": {"too long": 2}},
        "1": {"begun": [40, 10], "waiting": [], "open": [[], []], "skipped": {"too long": 1}},
    },
}


RUN_CONFIG = {
    "train": {
        "lr": {"value": 0.03, "from": "command line"},
        "beta1": {"value": 0.9, "from": "some.json"},
        "train_iters": {"value": 7, "from": "default"},
    },
    "data.few": {"abs_weight": {"value": 0.5, "from": "mixture.json"}},
}


class Given:
    """Tensors that are there already, as a snapshot takes them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.meta = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.meta.items())


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(MODEL).items()}


def save(run: str, step: int, weights: dict[str, torch.Tensor] | None = None, **counts: object) -> Path:
    weights = tensors() if weights is None else weights
    snapshot = Snapshot(
        step=step,
        weights=Given(weights),
        optimizer=Given({f"{name}.exp_avg": weight * 0.5 for name, weight in weights.items()}),
        ema=None,
        loader_state=POSITION,
        trainer_state={
            "iteration": step,
            "global_token_pass": 1000 * step,
            "global_total_task_token": {"few": 400 * step, "many": 600 * step},
            **counts,
        },
        json_files={"config.json": MODEL.to_json(), "run_config.json": RUN_CONFIG},
        tokenizer_files={"tokenizer.json": "{}"},
    )
    return save_checkpoint(CHECKPOINTS_DIR / run, snapshot)


def file_of(folder: Path, suffix: str = ".pt") -> Path:
    return folder / f"fm9g_live_checkpoint-{folder.name}{suffix}"


def seal(folder: Path) -> None:
    """Makes the manifest fit to what is there, as if it had been saved so."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    sums = {str(f.relative_to(folder)): [f.stat().st_size, f"{zlib.crc32(f.read_bytes()):08x}"] for f in files}
    (folder / MANIFEST).write_text(json.dumps({"step": int(folder.name), "files": sums}))


def put_weights(folder: Path, suffix: str = ".pt", **changes: torch.Tensor | None) -> None:
    """A file of the usual weights but for `changes` (None: without; __ stands for a dot), and a manifest that fits."""
    weights = {**tensors(), **{name.replace("__", "."): value for name, value in changes.items()}}
    torch.save({name: value for name, value in weights.items() if value is not None}, file_of(folder, suffix))
    seal(folder)


def no_progress(_: int) -> None:
    pass
