"""What keeps a tokenizer of the `tokenizers` library from ending a program without a word, or from never ending.

Its regular expressions come with a model. The library is in Rust: where an expression is beyond its engine's limit it
panics, which is no Exception of Python, and while it works no signal reaches it. So a thread looks after it now and
then, and ends the process with a message. The library lets other threads work in its methods for batches alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fm9g.errors import UserError

BASE_SECONDS, CHARACTERS_PER_SECOND = (
    60.0,
    20_000,
)  # for a call, and one more for so many characters: usual are millions
_CHECK_INTERVAL = 1.0  # seconds; checks are counted: a program that was stopped (Ctrl-Z) has its time afterwards

os.environ["RUST_BACKTRACE"] = "0"  # a panic writes a line to stderr, or with it some sixty


class UnreadableTextError(UserError):
    """A tokenizer cannot take a text."""


class bounded_encoding:  # noqa: N801 - used like a function of contextlib
    """Around a call of the library. where: the tokenizer. characters: that are encoded.

    Raises UnreadableTextError for a panic. A call that takes too long ends this process, with a message on stderr.
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
    """Around other calls of the library: as bounded_encoding, but they may take any time."""
    try:
        yield
    except BaseException as error:
        _raise_panic(where, error)
        raise


def _raise_panic(where: object, error: BaseException | None) -> None:
    if type(error).__name__ == "PanicException":  # a class that pyo3 makes when it needs it
        raise UnreadableTextError(f"{where}: the tokenizer broke off: {error}. {_REMEDY}") from None


_REMEDY = (
    "A regular expression of its tokenizer.json is not made for such a text: take the tokenizer from its publisher, or "
    "leave the record out"
)


class _EncodingWatchdog:
    """Of this process; the calls are those of one thread, one after the other."""

    _process = 0  # in which the thread runs
    _call: tuple[object, float] | None = None  # where it is, and its seconds; None: nothing is watched

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
