"""Verification finds every kind of damage."""

from __future__ import annotations

import math

import torch
from helpers.checkpoints import (
    file_of,
    no_progress,
    put_weights,
    save,
    seal,
)

from fm9g.checkpoint.inspect import verify, verify_bytes


def test_verify_finds_what_checksums_do_not_show() -> None:
    folder = save("m", 1)
    bad = torch.ones(8)
    bad[2:4] = torch.tensor([math.nan, -math.inf])
    put_weights(folder, encoder__output_layernorm__weight=bad)
    [damage] = verify(folder, no_progress).problems
    assert damage == "fm9g_live_checkpoint-1.pt: 2 values are not finite, in encoder.output_layernorm.weight"
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert verify(folder, no_progress).problems == ["tokenizer/tokenizer.json: is missing", damage]
    put_weights(folder, encoder__output_layernorm__weight=torch.ones(9), lm_head__weight=None)
    [damage] = verify(folder, no_progress).problems
    assert "encoder.output_layernorm.weight: shape [9], expected [8]" in damage
    put_weights(folder, lm_head__weight=None)
    assert verify(folder, no_progress).problems == ["fm9g_live_checkpoint-1.pt: lm_head.weight is missing"]
    put_weights(folder)
    put_weights(folder, ".ema.pt", encoder__output_layernorm__weight=torch.ones(8) * math.inf)
    [damage] = verify(folder, no_progress).problems
    assert damage.startswith("fm9g_live_checkpoint-1.ema.pt: 8 values are not finite")


def test_verify_takes_a_checkpoint_without_optimizer_but_not_without_weights() -> None:
    folder = save("m", 1)
    file_of(folder, ".rank-0.opt").unlink()
    seal(folder)
    assert verify(folder, no_progress).problems == []
    file_of(folder).unlink()
    seal(folder)
    assert verify(folder, no_progress).problems == ["its weight file is missing"]
    moved = folder.rename(folder.parent / "2")
    assert verify(moved, no_progress).problems[0] == "manifest.json: is that of step 1; rename the folder to 1"


def test_verify_counts_as_many_bytes_as_it_foretells() -> None:
    folder, done = save("m", 1), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    verify(folder, advance)
    foretold = verify_bytes(folder)
    assert 0.5 * foretold < done <= foretold  # the small model's files are mostly names
