"""The wheel, as a user gets it: built, installed into an empty environment, and run outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.common import ROOT

pytestmark = pytest.mark.slow  # it installs torch
_SOURCES = ("fm9g", "model_configs", "train_configs", "dataset_configs")
_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def pip(python: Path | str, *words: str) -> None:
    """Runs pip; skips the test if there is no package index."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    unreachable = ("No matching distribution found for", "Could not find a version", "connection broken")
    if done.returncode and any(text in done.stderr for text in unreachable):
        pytest.skip(f"pip finds no package index here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources: setuptools would also pack what an earlier build left in build/."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in _SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(ROOT / name, folder / "source" / name)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "source"))
    (wheel,) = folder.glob("fm9g-*.whl")
    return wheel


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fm9g/")}
    files = {path for path in (ROOT / "fm9g").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


def test_quickstart_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip(python, "install", "--no-compile", "-c", str(ROOT / "constraints.txt"), str(wheel))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    where = [str(python), "-c", "import fm9g; print(fm9g.__file__)"]
    done = subprocess.run(where, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(folder))
    command = [str(folder / "bin" / "fm9g"), "quickstart", "--steps", "5"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quickstart" / "hf" / "model.safetensors").is_file()
