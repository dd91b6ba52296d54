"""Pools of worker processes that end with their parent process and ignore its Ctrl-C."""

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
from fm9g.process_memory import tune_malloc

set_child_safe_path()  # on import, because multiprocessing starts a process even for a lock

MAX_WORKERS = 1024
_MAX_DEFAULT_WORKERS = 8


def check_workers(count: int | None) -> None:
    """Raises UserError for a number of processes that no machine runs; None (chosen later) is accepted."""
    if count is not None and not 0 <= count <= MAX_WORKERS:
        raise UserError(f"workers: found {count}, expected 0 to {MAX_WORKERS}")


def default_workers(num_bytes: float, min_bytes: int) -> int:
    """One worker per core, up to 8; 0 if there are at most `min_bytes` to read."""
    return min(os.cpu_count() or 1, _MAX_DEFAULT_WORKERS) if num_bytes > min_bytes else 0


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """Starts `count` workers, and ends them with the block; None for 0."""
    if not count:
        yield None
        return
    pool = start_workers(count)
    try:
        yield pool
    finally:
        stop_workers(pool)


def start_workers(count: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Starts a pool of processes, each of which runs initializer(*arguments) first."""
    # spawn: a forked child of a process with torch threads or a CUDA context can hang.
    context = multiprocessing.get_context("spawn")
    with shared_memory_errors():
        return ProcessPoolExecutor(
            count, mp_context=context, initializer=_init_process, initargs=(initializer, arguments)
        )


@contextmanager
def shared_memory_errors() -> Iterator[None]:
    """Around the creation of shared memory. Raises UserError if the system has none left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise UserError(
            "/dev/shm is full; worker processes need it to report their status. Delete files there that belong to "
            "processes that have ended, enlarge it in a container (docker run --shm-size), or use 0 workers"
        ) from None


def stop_workers(pool: ProcessPoolExecutor) -> None:
    """Kills the processes of a pool: they hold nothing that could be lost, and may be in an endless loop."""
    processes = list((pool._processes or {}).values())  # Python 3.14 has a method for this
    manager, results = pool._executor_manager_thread, pool._result_queue  # shutdown drops both
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    # If a worker is killed while it writes a result, the manager thread waits for the rest, and Python waits for the
    # manager at its exit. No other process can write that rest: once our writing end is closed, the manager reads the
    # end of the file.
    if results is not None:
        results._writer.close()  # type: ignore[attr-defined]
    if manager is not None and manager.is_alive():  # type: ignore[attr-defined] # it may not have started
        manager.join()  # type: ignore[attr-defined]


def _init_process(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tune_malloc()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already uses all cores
    if initializer is not None:
        initializer(*arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed and could not end its workers
