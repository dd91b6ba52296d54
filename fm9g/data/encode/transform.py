"""Transforms: the user's Python functions on records, and the guard that turns their failures into messages."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular
from fm9g.process_memory import rss_bytes

MAX_SHOWN_CHARACTERS = 200  # of what a transform returned or raised
_TICK_SECONDS = 0.1  # between two checks of time and memory
_MAX_TICK_GAP = 5.0  # seconds between two checks that count: in a longer gap, the program was stopped (Ctrl-Z)

Transform = Callable[[dict[str, Any], int, random.Random], dict[str, Any]]


def load_transform(path: Path, where: str, seconds: float) -> Transform:
    """Executes a Python file and returns its function `transform`.

    Args:
        where: what messages call the file.
        seconds: limit of the execution; 0: none.

    Raises UserError if the file defines no such function, or fails.
    """
    check_regular(path)
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where}: this user has no permission to read it")
    register_input(path)
    spec = importlib.util.spec_from_file_location(f"fm9g_transform_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: not a Python file (.py)")
    if isinstance(spec.loader, SourceFileLoader):
        spec.loader = _UncachedLoader(spec.loader.name, spec.loader.path)
    module = importlib.util.module_from_spec(spec)
    with guard_user_code(where, seconds):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "transform", None)):
        raise UserError(f"{where}: it defines no function transform(data, num_sample, r)")
    transform: Transform = module.transform
    return transform


class _UncachedLoader(SourceFileLoader):
    """Leaves no __pycache__ in the folder of the user's file."""

    def set_data(self, *_: object, **__: object) -> None: ...


class guard_user_code:  # noqa: N801 - used like a function of contextlib
    """Turns failures of the user's code in the block into UserError: any exception, an exit, too much time or memory.

    Ctrl-C remains a KeyboardInterrupt. Code that blocks in C cannot be interrupted.

    Args:
        where: what messages call the code.
        seconds: limit of time; 0: none.
        hint: what a message about the time says in parentheses.
        memory: bytes that the process may grow by, approximately, if there is a limit of time; 0: any number.
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
    """Installed once for all blocks: handlers of two signals, and the refusal to end the process."""

    _owner: tuple[int, int] | None = None  # process and thread of the running block
    _seconds, _hint, _memory = 0.0, "", 0
    _seconds_left, _checked_at = 0.0, 0.0  # of the block; time.monotonic() at the last check
    _max_resident = 0  # bytes; 0: not known yet
    _was_interrupted = False
    _previous_timer = (0.0, 0.0)  # of the program
    _alarm_of_program: Any = None  # its handler, which runs between blocks
    _process = 0  # the process in which the handlers are installed
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
            interval = min(_TICK_SECONDS, seconds), _TICK_SECONDS
            cls._previous_timer = signal.setitimer(signal.ITIMER_REAL, *interval)

    @classmethod
    def stop(cls) -> bool:
        """Returns whether Ctrl-C was pressed in the block."""
        cls._owner = None  # first, so that an alarm that arrives now is ignored
        if cls._is_timed:  # an alarm of the program comes later by the time of the block
            signal.setitimer(signal.ITIMER_REAL, *cls._previous_timer)
        return cls._was_interrupted

    @classmethod
    def _install(cls) -> None:
        if cls._process == os.getpid():
            return
        cls._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            cls._alarm_of_program = signal.signal(signal.SIGALRM, cls._on_alarm)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, cls._on_sigint)
        os._exit = cls._refuse_exit

    @classmethod
    def _on_sigint(cls, number: int, frame: FrameType | None) -> NoReturn:
        cls._was_interrupted = True
        raise KeyboardInterrupt

    @classmethod
    def _on_alarm(cls, number: int, frame: FrameType | None) -> None:
        if not cls._owner:
            if callable(cls._alarm_of_program):
                cls._alarm_of_program(number, frame)
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
        if cls._owner == (
            os.getpid(),
            threading.get_ident(),
        ):  # not another thread, nor a child process
            raise GuardError(f"calls os._exit({status!r}); return a record instead")
        _exit(status)


_exit = os._exit


class GuardError(BaseException):
    """The reason for ending a block. Not an Exception, which the user's code might catch."""


def describe_error(error: BaseException) -> str:
    """The class and the text of an error, whose class may be the user's and fail to give a text."""
    text = safe_repr(error, str)
    return text if isinstance(error, GuardError) else f"{type(error).__name__}: {text}"


def safe_repr(value: Any, make: Callable[[Any], str] = repr) -> str:
    """The beginning of a value as text; `make` may be the user's code and fail."""
    try:
        return make(value)[:MAX_SHOWN_CHARACTERS]
    except BaseException as error:
        return f"(its text cannot be created: {type(error).__name__})"


class TrackedRandom(random.Random):
    """Records whether a number was drawn from it; if not, a result does not depend on it."""

    used_rng = False

    def random(self) -> float:
        self.used_rng = True
        return super().random()

    def getrandbits(self, k: int) -> int:
        self.used_rng = True
        return super().getrandbits(k)
