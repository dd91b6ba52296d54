"""A pipe in the place of a file is refused, and not waited for."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fm9g.config.model import load_model_config
from fm9g.convert.hf_reader import open_hf_tensors
from fm9g.data.encode.template import load_template
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.data.encode.transform import load_transform
from fm9g.data.prepare.columns import columns_from_file
from fm9g.data.prepare.sources import find_sources
from fm9g.errors import UserError


@contextmanager
def pipe(path: Path) -> Iterator[Path]:
    """A FIFO nobody writes to. After a while it ends, so that the test fails and does not wait."""
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)

    def end() -> None:
        with suppress(OSError):  # nobody waits
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    timer = threading.Timer(10, end)
    timer.start()
    try:
        yield path
    finally:
        timer.cancel()


OPENERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "columns": ("a.json", columns_from_file),
    "model configuration": ("a.json", load_model_config),
    "parquet": ("a.parquet", lambda path: find_sources([str(path)])),
    "folder of data": ("data/a.jsonl", lambda path: find_sources([str(path.parent)])),
    "glob": ("a.jsonl", lambda path: find_sources([str(path.parent / "*.jsonl")])),
    "template": ("a.jinja", lambda path: load_template(str(path), None)),
    "transform": ("a.py", lambda path: load_transform(path, "where", 1.0)),
    "SentencePiece model": ("a.model", load_tokenizer),
    "vocabulary": ("vocab.txt", load_tokenizer),
    "file of a tokenizer": ("t/tokenizer.json", lambda path: load_tokenizer(path.parent)),
    "weights": ("h/model-1.safetensors", lambda path: open_hf_tensors(path.parent)),
}


@pytest.mark.parametrize("what", OPENERS)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, what: str) -> None:
    name, opener = OPENERS[what]
    with pipe(tmp_path / name) as path, pytest.raises(UserError, match=r"found a pipe \(FIFO\), expected a file"):
        opener(path)


def test_a_tokenizer_is_not_opened_beside_a_pipe(tmp_path: Path) -> None:
    train_tokenizer(["a b"], 300, tmp_path / "t")
    with pipe(tmp_path / "t" / "config.json"), pytest.raises(UserError, match=r"config\.json: found a pipe"):
        load_tokenizer(tmp_path / "t")
