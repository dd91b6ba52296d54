"""Runs a function in several processes at once, as the ranks of a run."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

from helpers.common import ROOT

# One server imports the slow packages, and forks the processes of all tests.
context = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.tensor.parallel",
    "helpers.engine_harness",
    "peft",
    "tensorboardX",
    "jsonschema",
    "faults.runs",
]
context.set_forkserver_preload(PRELOADED)
SECONDS = 300


@functools.cache
def start_server() -> None:
    """Starts the server, with the path from which it and its forks import."""
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH")]))
    # Killed processes leave semaphores, which Python removes with a warning.
    ignored = "ignore::UserWarning:multiprocessing.resource_tracker"
    with mock.patch.dict(os.environ, PYTHONPATH=path, PYTHONWARNINGS=ignored):
        process = context.Process(target=_nothing)
        process.start()
    process.join()


def _nothing() -> None: ...


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(dist_context, *arguments) in each of world_size processes; their results, in the order of ranks."""
    start_server()
    content = pickle.dumps(arguments)  # tensors by value, not as shared memory
    with tempfile.TemporaryDirectory() as folder:
        answers = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank, args=(rank, world_size, f"{folder}/store", answers[rank][1], function, content)
            )
            for rank in range(world_size)
        ]
        for process, (_, sender) in zip(ranks, answers):
            process.start()
            sender.close()
        try:
            return _collect([receiver for receiver, _ in answers])
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(receivers: list[Any]) -> list[Any]:
    """The answers in the order of ranks. Fails at the first rank that fails."""
    answers: dict[int, Any] = {}
    while len(answers) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in answers]
        ready = multiprocessing.connection.wait(waiting, SECONDS)
        assert ready, f"no answer in {SECONDS} s; ranks {sorted(answers)} are done"
        for receiver in ready:
            rank = receivers.index(receiver)
            answers[rank], error = pickle.loads(receiver.recv_bytes())
            assert not error, f"rank {rank}:\n{error}"
    return [answers[rank] for rank in range(len(receivers))]


def _rank(rank: int, world_size: int, store: str, sender: Any, function: Callable[..., Any], content: bytes) -> None:
    import torch
    import torch.distributed as dist

    from fm9g.engine.dist_context import DistContext

    torch.set_num_threads(1)
    try:
        with DistContext("cpu", rank, world_size, rank, world_size, dist.FileStore(store, world_size)) as dist_context:
            answer = (function(dist_context, *pickle.loads(content)), "")
    except BaseException:
        answer = (None, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
