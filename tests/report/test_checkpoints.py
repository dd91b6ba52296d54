"""The advice which checkpoint to use."""

import json
import shutil
from pathlib import Path

from helpers.report_page import LOSSES, page_of, run_json

from fm9g.checkpoint.layout import file_name


def checkpoint(root: Path, step: int, val_loss: float | None) -> None:
    """A whole checkpoint, as far as its manifest and its counts go."""
    folder = root / str(step)
    folder.mkdir(parents=True)
    counts = folder / file_name(step, "trainer_state")
    counts.write_text(json.dumps({"val_loss": val_loss}))
    manifest = {"step": step, "files": {counts.name: [counts.stat().st_size, "0"]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_page_says_which_checkpoint_to_use(make_run, settings) -> None:
    root = Path("data/checkpoints/my run")
    losses = {2: 3.0, 4: 2.5, 5: 2.25, 6: 4.0}
    metrics = [{"step": step, "Loss/train": 2.0, "Loss/val": loss, "Loss/val/v": loss} for step, loss in losses.items()]
    run = run_json(settings, model_unique="my run", save=True, lora_layer=[], pretrained_model="")
    make_run("group_my run", metrics=metrics, run=run)

    def advice() -> str:
        return " ".join(page_of("group_my run")[0].within["checkpoints"].split())

    assert "No checkpoint of this run is in data/checkpoints/my run." in advice()
    checkpoint(root, 1, 9.0)
    (root / "1" / file_name(1, "trainer_state")).write_text("cut")
    assert "No checkpoint in data/checkpoints/my run is complete" in advice()
    shutil.rmtree(root)
    for step in (2, 4, 6):
        checkpoint(root, step, losses[step])
    text = advice()
    assert "Step 4, the best, validation loss 2.5000: data/checkpoints/my run/4." in text
    assert "fm9g convert 'data/checkpoints/my run/4' 'hf-my run-4'" in text
    assert "Step 6, the last, validation loss 4.0000" in text
    assert "lower still at step 5 (2.2500), which has no checkpoint" in text
    checkpoint(root, 5, 2.25)
    shutil.rmtree(root / "6")
    text = advice()
    assert "Step 5, the best, and the last" in text
    assert "lower still" not in text


def test_without_validation_the_last_checkpoint_is_named(make_run, settings) -> None:
    adapters = {"lora_layer": ["project_q"], "pretrained_model": "base"}
    make_run("lora", metrics=LOSSES, run=run_json(settings, model_unique="lora", **adapters))
    checkpoint(Path("data/checkpoints/lora"), 4, None)
    text = page_of("lora")[0].within["checkpoints"]
    assert "Use the last one: the run had no validation data" in text
    assert "fm9g lora merge base data/checkpoints/lora/4 hf-lora-4" in text
    make_run("old", metrics=LOSSES)
    assert "checkpoints" not in page_of("old")[0].within
