"""Records and types of the tests of `fm9g data check` and `fm9g data show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Make = Callable[..., Path]
CHAT = {
    "messages": [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "Z\nX"},
        {"role": "user", "content": "W 深度"},
        {"role": "assistant", "content": "Y 学习"},
    ]
}


def z(read: int, trained: int) -> dict:
    """A record of read + trained + 1 tokens: no two Z are merged by the tests' tokenizer, and eos comes behind."""
    return {"input": "Z" * read, "output": "Z" * trained}
