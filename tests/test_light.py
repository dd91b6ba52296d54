"""What the verbs import: nothing heavy before it is needed. Modules are looked at, not times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import index_dataset, make_records, write_jsonl

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pyarrow", "bitsandbytes", "peft", "accelerate", "pandas")
_PROGRAM = """
import sys
from fm9g.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as end:
    code = end.code
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
print("exit", code, "loaded", *loaded, file=sys.stderr)
"""


def loaded(words: list[str], folder: Path) -> set[str]:
    """The heavy modules that a command line imported."""
    command = [sys.executable, "-c", _PROGRAM, ",".join(HEAVY), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    last = done.stderr.splitlines()[-1].split()
    assert last[:2] in (["exit", "0"], ["exit", "None"]), done.stderr
    return set(last[3:])


@pytest.fixture
def work(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A folder with data, an indexed dataset, a mixture, a tokenizer and a run with a checkpoint."""
    source = write_jsonl(tmp_path / "s.jsonl", make_records(5))
    index_dataset(source, tmp_path / "indexed", "en")
    (tmp_path / "mixture.json").write_text('[{"task_name": "t", "path": "indexed"}]', encoding="utf-8")
    (tmp_path / "tokenizer").symlink_to(tokenizer_path)
    step = tmp_path / "run" / "2"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text('{"step": 2, "files": {}}', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "train --help",
        "data index --help",
        "config show --config tiny",
        "config keys",
        "config show --config tiny --data s.jsonl,indexed#3 --val_split 0.5 --data_cache_dir cache",
        "plan --config tiny",
        "data index --path s.jsonl --language en --output o",
        "data tokenizer s.jsonl --vocab_size 300 --output t",
        "ckpt ls run",
    ],
)
def test_light_verbs_import_nothing_heavy(words: str, work: Path) -> None:
    assert loaded(words.split(), work) == set()


def test_checkpoints_are_found_and_listed_without_torch(work: Path) -> None:
    modules = ("checkpoint", "find", "layout", "listing", "manifest", "steps")
    program = f"import sys; from fm9g.checkpoint import {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=work).returncode == 0


def test_samples_are_shown_with_what_opens_a_tokenizer_alone(work: Path) -> None:
    words = "data show mixture.json --tokenizer tokenizer --count 1"
    assert loaded(words.split(), work) <= {"torch", "transformers"}  # transformers imports torch


@pytest.mark.slow  # doctor imports them all, elsewhere
def test_doctor_leaves_the_packages_that_it_tries_to_other_processes(work: Path) -> None:
    assert loaded(["doctor"], work) == set()
