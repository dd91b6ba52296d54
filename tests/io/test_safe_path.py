"""Files that lie where a command is run are not executed, whatever their names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT, write_jsonl

# Modules that Python, torch or fm9g import in processes of their own.
NAMES = ("token", "inspect", "socket", "pickle", "selectors", "json", "torch", "numpy", "fm9g", "sitecustomize")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with modules that leave a trace when they are imported."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\nraise Exception\n"
        )
    return tmp_path


def fm9g(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("fm9g")), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_workers_that_index(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [{"input": "", "output": "text"}])
    done = fm9g(folder, "data", "index", "--path", "a.jsonl", "--language", "en", "--output", "d", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "executed").exists()


def test_processes_that_train_and_their_own(folder: Path, tokenizer_path: Path) -> None:
    write_jsonl(folder / "a.jsonl", [{"input": "", "output": "text"}] * 40)
    fm9g(folder, "data", "index", "--path", "a.jsonl", "--language", "en", "--output", "d")
    (folder / "m.json").write_text('[{"task_name": "a", "path": "d"}]')
    keys = "--dataset_config ./m.json --max_length 32 --batch_size 1 --train_iters 2 --dataloader_num_workers 1"
    done = fm9g(
        folder,
        *("train", "--config", "tiny", "--nproc", "1", "--max-restarts", "1"),  # an agent, and a process that it starts
        *("--tokenizer_path", str(tokenizer_path), *keys.split()),
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "executed").exists()
