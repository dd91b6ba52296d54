"""Functions run by several processes at once, as the ranks of a run."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

# One server imports torch, and the ranks are its forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "fm9g.train.run"])
SECONDS = 120


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(processes, *arguments) in each of so many processes; what they return, in the order of ranks."""
    content = pickle.dumps(arguments)  # tensors by value, not as shared memory
    with tempfile.TemporaryDirectory() as folder:
        answers = [_context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _context.Process(
                target=_rank, args=(rank, world_size, f"{folder}/store", answers[rank][1], function, content)
            )
            for rank in range(world_size)
        ]
        for process, (_, sender) in zip(ranks, answers):
            process.start()
            sender.close()
        try:
            return [_answer(rank, receiver) for rank, (receiver, _) in enumerate(answers)]
        finally:
            for process in ranks:
                process.join(10)
                process.kill()


def _answer(rank: int, receiver: Any) -> Any:
    if not receiver.poll(SECONDS):
        raise AssertionError(f"rank {rank} gave no answer in {SECONDS} s")
    value, error = pickle.loads(receiver.recv_bytes())
    if error:
        raise AssertionError(f"rank {rank}:\n{error}")
    return value


def _rank(rank: int, world_size: int, store: str, sender: Any, function: Callable[..., Any], content: bytes) -> None:
    import torch
    import torch.distributed as dist

    from fm9g.engine.processes import Processes

    torch.set_num_threads(1)
    try:
        with Processes("cpu", rank, world_size, rank, dist.FileStore(store, world_size)) as processes:
            answer = (function(processes, *pickle.loads(content)), "")
    except BaseException:
        answer = (None, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
