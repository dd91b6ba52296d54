"""Worker processes that neither outlive the process they work for nor take its Ctrl-C for their own."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from fm9g.errors import UserError
from fm9g.io.safe_path import set_child_safe_path
from fm9g.memory import tune_malloc

set_child_safe_path()  # as soon as there may be any: multiprocessing starts one for a lock already


MAX_WORKERS = 1024


def check_workers(count: int | None) -> None:
    """Raises UserError for so many processes as no machine runs; None stands for a number that is still chosen."""
    if count is not None and not 0 <= count <= MAX_WORKERS:
        raise UserError(f"workers: found {count}, expected 0 to {MAX_WORKERS}")


def start_workers(count: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A pool of processes. prepare(*arguments): run in each as it starts."""
    # spawn: a forked child of a process with torch threads or a CUDA context can hang.
    context = multiprocessing.get_context("spawn")
    with shared_memory_errors():
        return ProcessPoolExecutor(
            count, mp_context=context, initializer=_init_process, initargs=(initializer, arguments)
        )


@contextmanager
def shared_memory_errors() -> Iterator[None]:
    """For what processes share. Raises UserError where the system has no memory for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise UserError(
            "/dev/shm is full, where worker processes share what they do. Delete what ended processes left there, give "
            "a container more of it (docker run --shm-size), or ask for 0 workers"
        ) from None


def stop_workers(pool: ProcessPoolExecutor) -> None:
    """Ends the processes of a pool at once: they hold nothing that could be lost, and may be in an endless loop."""
    processes = list((pool._processes or {}).values())  # Python 3.14 has a method for this
    manager, results = pool._executor_manager_thread, pool._result_queue  # which shutdown forgets
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    # A worker that is killed in the middle of a result leaves the manager, and so the exit of Python, waiting for the
    # rest. Nobody else can write it: where the writing end is closed, the manager reads the end of file.
    if results is not None:
        results._writer.close()  # type: ignore[attr-defined]
    if manager is not None and manager.is_alive():  # type: ignore[attr-defined] # it may not have started
        manager.join()  # type: ignore[attr-defined]


def _init_process(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tune_malloc()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    if initializer is not None:
        initializer(*arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed and could not end its workers
