"""Verification of a conversion: it finds mistakes, and says which lengths it compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hf_models import make_hf_model
from safetensors.torch import load_file, save_file

from fm9g.cli import main
from fm9g.config.model import load_model_config
from fm9g.convert import hf_export
from fm9g.convert.hf_reader import open_hf_folder
from fm9g.convert.resumable_writer import OutputFile
from fm9g.convert.source import open_9g_weights
from fm9g.convert.verify import verify


def test_verification_finds_a_changed_weight(
    pt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in ("fp32", "fp16", "bf16"):
        arguments = ["convert", str(pt_file), str(tmp_path / dtype), "--dtype", dtype, "--verify"]
        assert main(arguments) == 0
        assert "read by Qwen2ForCausalLM" in capsys.readouterr().out
    write = hf_export.write_resumable

    def wrong(folder: Path, outputs: list[OutputFile], title: str) -> None:
        write(folder, outputs, title)
        file = folder / outputs[0].name
        tensors = {name: tensor * (tensor.shape[-1:] != (48,)) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(hf_export, "write_resumable", wrong)
    assert main(["convert", str(pt_file), str(tmp_path / "x"), "--dtype", "fp16", "--verify"]) == 2
    assert "NOT within the tolerance" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["window", "dynamic rope"])
def test_verification_looks_beyond_the_lengths_at_which_the_arithmetic_changes(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake that the first 40 tokens do not show is found, and the output names the lengths."""
    rope = {"type": "dynamic", "factor": 3.0}
    kind, changes = ("mistral", {"sliding_window": 40}) if what == "window" else ("llama", {"rope_scaling": rope})
    make_hf_model(kind, {**changes, "max_position_embeddings": 40}, tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "m.pt"), "--verify"]) == 0
    beyond = "the window of 40" if what == "window" else "the original length of 40"
    stdout = capsys.readouterr().out
    assert f"104 (beyond {beyond})" in stdout
    assert "within the tolerance" in stdout
    values = json.loads((tmp_path / "m.json").read_text())
    wrong = {"sliding_window": 41} if what == "window" else {"rope_scaling_factor": 1.5}
    (tmp_path / "m.json").write_text(json.dumps(values | wrong))
    config = load_model_config(tmp_path / "m.json")
    assert not verify(tmp_path / "hf", config, open_9g_weights(tmp_path / "m.pt", config)).passed


def test_verification_says_which_lengths_are_too_long_for_this_machine(tmp_path: Path) -> None:
    make_hf_model("mistral", {"sliding_window": 1000}, tmp_path / "hf")
    config, weights = open_hf_folder(tmp_path / "hf")
    diff = verify(tmp_path / "hf", config, weights, max_multiplications=1e5)
    assert "rows of 128 and 1064 (beyond the window of 1000) tokens were not tried" in str(diff)
