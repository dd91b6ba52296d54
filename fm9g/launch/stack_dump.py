"""The stacks of all threads, and the ranks for which the others wait: for a run that makes no progress."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from fm9g.launch.failure import TORCH_DISTRIBUTED_PATH


def dump_stacks() -> dict[str, Any]:
    """Returns the stacks of all Python threads of this process except the caller's.

    text: the stacks. in_collective: whether a thread is inside torch.distributed.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text, in_collective = [], False
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            stack = traceback.extract_stack(frame)
            in_collective = in_collective or any(TORCH_DISTRIBUTED_PATH in entry.filename for entry in stack)
            text += [f"thread {names.get(ident, ident)}:\n", *stack.format()]
    return {"text": "".join(text), "in_collective": in_collective}


def find_stragglers(steps: Sequence[int], in_collective: Sequence[bool]) -> list[int]:
    """Returns the ranks for which the others wait.

    These are the ranks in the earliest step; if all are in the same step, those outside of a collective operation; if
    there are none, all.
    """
    behind = [rank for rank, step in enumerate(steps) if step == min(steps)]
    if len(behind) < len(steps):
        return behind
    return [rank for rank, waiting in enumerate(in_collective) if not waiting] or behind
