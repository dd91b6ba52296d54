"""Worker processes that encode: their errors reach the user, and closing does not wait for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.common import load_steps, make_records
from helpers.mixtures import open_mixture

from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.data.load.loader import Loader
from fm9g.errors import UserError

Make = Callable[..., Path]


def test_an_error_in_a_worker_reaches_the_user(make_mixture: Make, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def transform(data, num_sample, r):\n    raise RuntimeError('boom')\n")
    path = make_mixture({"a": make_records(5)}, a={"transforms": "bad.py", "ave_tokens_per_line": 10})
    with pytest.raises(UserError, match="boom"):
        load_steps(open_mixture(path, tokenizer_path), 1, workers=1)


def test_a_worker_that_is_killed_is_reported(make_mixture: Make, tokenizer_path: Path, tmp_path: Path) -> None:
    script = "import os\ndef transform(data, num_sample, r):\n    os.kill(os.getpid(), 9)\n"
    (tmp_path / "kill.py").write_text(script)
    path = make_mixture({"a": make_records(5)}, a={"transforms": "kill.py", "ave_tokens_per_line": 10})
    with pytest.raises(
        UserError, match=r"a worker that encodes records was killed while it was at a, line \d of .*/a\."
    ):
        load_steps(open_mixture(path, tokenizer_path), 1, workers=1)


def test_closing_does_not_wait_for_a_worker_that_never_ends(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "endless.py").write_text("def transform(data, num_sample, r):\n    while True: pass\n")
    path = make_mixture({"a": make_records(5)}, a={"transforms": "endless.py", "ave_tokens_per_line": 10})
    loader = Loader(open_mixture(path, tokenizer_path), global_batch_size=1, workers=1)
    taken = threading.Thread(target=_next, args=(loader,), daemon=True)
    taken.start()
    time.sleep(3)  # the worker has started, or is about to
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 10


def _next(loader: Loader) -> None:
    with contextlib.suppress(UserError, RuntimeError):
        loader.next_batch()


def test_a_pool_whose_thread_has_ended_is_not_waited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fm9g.data.load.encoding_pool._POLL_SECONDS", 0.1)
    pool = EncodingPool.__new__(EncodingPool)
    pool._pool = SimpleNamespace(_executor_manager_thread=threading.Thread())  # it could not be started
    with pytest.raises(MemoryError):
        pool._result(Future())
