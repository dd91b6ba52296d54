"""The guide's scripts in tools/, with the commands of its chapters."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, small_model
from safetensors.torch import load_file

from fm9g.cli import main
from fm9g.io.pt_file import read_weights
from fm9g.model.transformer import weight_shapes


@pytest.fixture
def run_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs a script of tools/ as a command in the test's folder; returns its exit status."""

    def run(name: str, *arguments: object) -> object:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(ROOT / "tools"))  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        return end.value.code

    return run


def test_the_guides_tools_go_there_and_back(
    folder: Path, tmp_path: Path, run_tool: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("hgface_2_bmtrain.py", "--huggingface-dir", folder, "--bmtrain-ckpt-path", "7b.pt") == 0
    assert read_weights(tmp_path / "7b.pt").keys() == weight_shapes(small_model(qkv_bias=True)).keys()
    back = ["--huggingface-ref-dir", folder, "--bmtrain-ckpt-path", "7b.pt", "--huggingface-save-dir", "again"]
    assert run_tool("bmtrain_2_hgface.py", *back) == 0
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert run_tool("bmtrain_2_hgface.py", *back) == 2
    assert "the folder is not empty" in capsys.readouterr().err


def test_the_guides_tools_refuse_what_cannot_be_meant(
    folder: Path, tmp_path: Path, run_tool: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--huggingface-dir", folder, "--bmtrain-ckpt-path", "7b.pt"]
    assert [run_tool("hgface_2_bmtrain.py", *there, *more) for more in ([], [], ["--overwrite"])] == [0, 2, 0]
    capsys.readouterr()
    back = ["--huggingface-ref-dir", folder, "--bmtrain-ckpt-path", "7b.pt", "--huggingface-save-dir", "out.pt"]
    assert run_tool("bmtrain_2_hgface.py", *back) == 2
    assert "--huggingface-save-dir: found 'out.pt', expected the name of a folder" in capsys.readouterr().err
    assert main(["convert", str(folder), "forgotten"]) == 2
    assert "to convert it to a 9G file, give a target whose name ends in .pt" in capsys.readouterr().err
    assert main(["convert", "7b.pt", "8b.pt"]) == 2
    assert "is a file; give a Hugging Face folder to convert to a .pt file" in capsys.readouterr().err
    assert main(["convert", "7b.pt", "out", "--reference", "7b.pt"]) == 2
    assert "expected the Hugging Face folder that the model came from" in capsys.readouterr().err


def test_without_arguments_the_paths_of_the_guide_are_used(
    folder: Path, tmp_path: Path, run_tool: Callable[..., object]
) -> None:
    folder.rename(tmp_path / "ckpt")
    assert run_tool("hgface_2_bmtrain.py") == 0
    assert (tmp_path / "9g_models" / "7b.pt").is_file()
    assert (tmp_path / "9g_models" / "7b.json").is_file()
