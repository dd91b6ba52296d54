"""The user's Python files that shape records, and what keeps their mistakes from ending or stopping a run unsaid."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular
from fm9g.memory import rss_bytes

MAX_SHOWN_CHARACTERS = 200  # characters of what a transform returned or raised
_TICK_SECONDS = 0.1  # seconds between looks at the clock and the memory
_MAX_TICK_GAP = 5.0  # seconds between two looks at most: what is longer, the program was stopped (Ctrl-Z)

Transform = Callable[[dict[str, Any], int, random.Random], dict[str, Any]]


def load_transform(path: Path, where: str, seconds: float) -> Transform:
    """The function `transform` of a Python file. where: what messages call the file. seconds: see guarded.

    Raises UserError where there is none, or where the file cannot be executed.
    """
    check_regular(path)
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where}: this user may not read it")
    register_input(path)
    spec = importlib.util.spec_from_file_location(f"fm9g_transform_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    with guard_user_code(where, seconds):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "transform", None)):
        raise UserError(f"{where}: it defines no function transform(data, num_sample, r)")
    return module.transform


class guard_user_code:  # noqa: N801 - used like a function of contextlib
    """Whatever the user's code in the block does becomes a UserError: an error of any class, an exit of the process,
    more than so many seconds (0: any number; code that waits in C is not reached). Ctrl-C stays what it is.

    hint: what a message about the time says besides. memory: bytes that the block may take beyond what the process has
    at its beginning, about, in this thread's time limit; 0: any number.
    """

    def __init__(self, where: str, seconds: float, hint: str = "transform_timeout", memory: int = 0) -> None:
        self._where, self._limits = where, (seconds, hint, memory)

    def __enter__(self) -> None:
        _UserCodeWatchdog.start(*self._limits)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        was_interrupted = _UserCodeWatchdog.stop()
        if error is None or isinstance(error, UserError):
            return
        if was_interrupted:
            raise KeyboardInterrupt from None
        raise UserError(f"{self._where}: {describe_error(error)}") from error


class _UserCodeWatchdog:
    """What is installed once for all blocks: handlers of two signals, and the refusal to end the process."""

    _owner: tuple[int, int] | None = None  # process and thread of the block that runs
    _seconds, _hint, _memory = 0.0, "", 0
    _seconds_left, _checked_at = (
        0.0,
        0.0,
    )  # seconds of the block; when they were counted, on the clock of time.monotonic
    _max_resident = 0  # resident bytes; 0: not known yet
    _was_interrupted = False
    _process = 0  # in which the handlers are installed
    _is_timed = False

    @classmethod
    def start(cls, seconds: float, hint: str, memory: int) -> None:
        cls._install()
        cls._was_interrupted = False
        cls._seconds, cls._hint, cls._memory = seconds, hint, memory
        cls._seconds_left, cls._checked_at, cls._max_resident = seconds, time.monotonic(), 0
        cls._owner = os.getpid(), threading.get_ident()
        cls._is_timed = seconds > 0 and threading.current_thread() is threading.main_thread()
        if cls._is_timed:
            signal.setitimer(signal.ITIMER_REAL, min(_TICK_SECONDS, seconds), _TICK_SECONDS)

    @classmethod
    def stop(cls) -> bool:
        """Returns whether Ctrl-C was pressed in the block."""
        cls._owner = None  # first: an alarm that comes now ends nothing
        if cls._is_timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return cls._was_interrupted

    @classmethod
    def _install(cls) -> None:
        if cls._process == os.getpid():
            return
        cls._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, cls._on_alarm)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, cls._on_sigint)
        os._exit = cls._refuse_exit  # type: ignore[assignment]

    @classmethod
    def _on_sigint(cls, number: int, frame: FrameType | None) -> NoReturn:
        cls._was_interrupted = True
        raise KeyboardInterrupt

    @classmethod
    def _on_alarm(cls, number: int, frame: FrameType | None) -> None:
        if not cls._owner:
            return
        if cls._memory:
            taken = rss_bytes()
            cls._max_resident = cls._max_resident or taken + cls._memory
            if taken > cls._max_resident:
                raise GuardError(f"takes more than {cls._memory >> 20} MB of memory")
        now = time.monotonic()
        cls._seconds_left, cls._checked_at = cls._seconds_left - min(now - cls._checked_at, _MAX_TICK_GAP), now
        if cls._seconds_left <= 0:
            raise GuardError(f"takes more than {cls._seconds:g} seconds ({cls._hint})")

    @classmethod
    def _refuse_exit(cls, status: int) -> NoReturn:
        if cls._owner == (os.getpid(), threading.get_ident()):  # else a thread of ours, or a child process
            raise GuardError(f"calls os._exit({status!r}); return a record instead")
        _exit(status)


_exit = os._exit


class GuardError(BaseException):
    """Why a block was ended. Not an Exception, which the user's code might catch."""


def describe_error(error: BaseException) -> str:
    """The class of an error, and its text, which a class of the user's may fail to make."""
    text = safe_repr(error, str)
    return text if isinstance(error, GuardError) else f"{type(error).__name__}: {text}"


def safe_repr(value: Any, make: Callable[[Any], str] = repr) -> str:
    """The beginning of a value as text."""
    try:
        return make(value)[:MAX_SHOWN_CHARACTERS]
    except BaseException as error:
        return f"(its text cannot be made: {type(error).__name__})"


class TrackedRandom(random.Random):
    """Knows whether a number was drawn from it: if not, what was made with it does not depend on it."""

    used_rng = False

    def random(self) -> float:
        self.used_rng = True
        return super().random()

    def getrandbits(self, k: int) -> int:
        self.used_rng = True
        return super().getrandbits(k)
