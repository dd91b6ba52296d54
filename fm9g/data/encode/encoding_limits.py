"""Limits on the `tokenizers` library, whose regular expressions come with a model and may be malicious.

The library is written in Rust. If an expression exceeds the limits of its engine, it panics, which is no Exception in
Python. If one never ends, no signal reaches Python meanwhile. So a thread watches each call, and ends the process with
a message. Only the library's batch methods let that thread run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fm9g.errors import UserError

# The limit of a call: 60 seconds, and one more per 20,000 characters. Millions per second are usual.
BASE_SECONDS, CHARACTERS_PER_SECOND = 60.0, 20_000
# Checks are counted, not the clock read: a program that was stopped (Ctrl-Z) continues with the time it had left.
_CHECK_INTERVAL = 1.0  # seconds

os.environ["RUST_BACKTRACE"] = "0"  # otherwise a panic writes some sixty lines to stderr


class UnreadableTextError(UserError):
    """A tokenizer cannot encode a text."""


class bounded_encoding:  # noqa: N801 - used like a function of contextlib
    """Limits a call of the library inside a with block.

    Raises UnreadableTextError for a panic. A call that takes too long ends this process, with a message on stderr.

    Args:
        where: the tokenizer, as messages call it.
        characters: length of the encoded text.
    """

    def __init__(self, where: object, characters: int) -> None:
        self._where, self._characters = where, characters

    def __enter__(self) -> None:
        _EncodingWatchdog.start(self._where, BASE_SECONDS + self._characters / CHARACTERS_PER_SECOND)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        _EncodingWatchdog.stop()
        _raise_panic(self._where, error)


@contextmanager
def panics_as_user_error(where: object) -> Iterator[None]:
    """For other calls of the library: converts panics, without a limit of time."""
    try:
        yield
    except BaseException as error:
        _raise_panic(where, error)
        raise


def _raise_panic(where: object, error: BaseException | None) -> None:
    if type(error).__name__ == "PanicException":  # pyo3 creates the class on demand
        raise UnreadableTextError(f"{where}: the tokenizer broke off: {error}. {_REMEDY}") from None


_REMEDY = (
    "A regular expression in its tokenizer.json cannot handle this text: use the tokenizer of its publisher, or "
    "leave the record out"
)


class _EncodingWatchdog:
    """Watches the calls of one thread of this process."""

    _process = 0  # the process in which the watching thread runs
    _call: tuple[object, float] | None = None  # tokenizer, and seconds that it may take; None: no call to watch

    @classmethod
    def start(cls, where: object, seconds: float) -> None:
        if cls._process != os.getpid():
            cls._process = os.getpid()
            threading.Thread(target=cls._watch, daemon=True, name="encoding").start()
        cls._call = where, seconds

    @classmethod
    def stop(cls) -> None:
        cls._call = None

    @classmethod
    def _watch(cls) -> None:
        call, checks = cls._call, 0
        while True:
            time.sleep(_CHECK_INTERVAL)
            call, checks = cls._call, checks + 1 if cls._call is call else 0
            if call and checks * _CHECK_INTERVAL > call[1]:
                text = f"fm9g: {call[0]}: the tokenizer takes more than {call[1]:.0f} seconds. {_REMEDY}\n"
                sys.stderr.write(text)
                sys.stderr.flush()
                os._exit(2)
