"""Where the threads of all ranks are, when a step hangs."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from fm9g.launch.failure_analysis import TORCH_DISTRIBUTED_PATH


def dump_stacks() -> dict[str, Any]:
    """The stacks of all Python threads of this process but the calling one. in_collective: whether a
    thread of it is inside torch.distributed."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text, in_collective = [], False
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            stack = traceback.extract_stack(frame)
            in_collective = in_collective or any(TORCH_DISTRIBUTED_PATH in entry.filename for entry in stack)
            text += [f"thread {names.get(ident, ident)}:\n", *stack.format()]
    return {"text": "".join(text), "in_collective": in_collective}


def find_stragglers(steps: Sequence[int], in_collective: Sequence[bool]) -> list[int]:
    """The ranks that the others wait for: those in the earliest step; if all are in one, those that do not wait in a
    collective operation themselves; if that tells nothing, all."""
    behind = [rank for rank, step in enumerate(steps) if step == min(steps)]
    if len(behind) < len(steps):
        return behind
    return [rank for rank, waiting in enumerate(in_collective) if not waiting] or behind
