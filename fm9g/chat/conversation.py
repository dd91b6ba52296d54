"""A conversation: its messages, what of it fits into the context, and its file."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.io.json_file import DuplicateKeyError, reject_duplicate_keys
from fm9g.io.regular_file import check_regular

Message = dict[str, str]
_MAX_BYTES = 64 << 20


@dataclass
class Conversation:
    """What was said to one model, and its answers.

    Args:
        system: the system prompt; empty: none.
        turns: pairs of question and answer.
        unanswered: a question whose answer failed; it is not part of the conversation.
    """

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    unanswered: str = ""

    def messages(self, question: str = "", first_turn: int = 0) -> list[Message]:
        """Messages as in the OpenAI API.

        Args:
            question: that comes next; empty: none.
            first_turn: number of the first turn that is not left out.
        """
        pairs = [("system", self.system)] if self.system else []
        for asked, answered in self.turns[first_turn:]:
            pairs += [("user", asked), ("assistant", answered)]
        pairs += [("user", question)] if question else []
        return [{"role": role, "content": content} for role, content in pairs]

    def first_turn_that_fits(self, question: str, fits: Callable[[list[Message]], bool]) -> int:
        """Number of turns that must be left out before a conversation with the question fits; at most all."""
        if not self.turns or fits(self.messages(question)):
            return 0
        return bisect_left(range(len(self.turns)), True, lo=1, key=lambda first: fits(self.messages(question, first)))


def save_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """Writes one line {"messages": [...]} for each conversation, as `fm9g data index` reads them.

    Raises UserError if the file exists, or there is nothing to save.
    """
    lines = [json.dumps({"messages": item.messages()}, ensure_ascii=False) for item in conversations if item.turns]
    if not lines:
        raise UserError(f"{path}: not written: there is no answer to save yet")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already; choose another name")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def load_conversations(path: Path) -> list[Conversation]:
    """Reads what `save_conversations` wrote. Raises UserError with file, line and message for anything else."""
    check_regular(path, _MAX_BYTES)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    found = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: is empty")
    return found


def _parse(line: str, where: str) -> Conversation:
    try:
        content = json.loads(line, object_pairs_hook=reject_duplicate_keys)
    except DuplicateKeyError as error:
        raise UserError(f"{where}: key {error.key!r} is given twice; keep one of them") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{where}: expected {{"messages": [...]}}')
    for number, message in enumerate(messages, 1):
        _check_message(message, f"{where}, message {number}")
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not rest or [message["role"] for message in rest] != ["user", "assistant"] * (len(rest) // 2):
        raise UserError(f"{where}: expected messages of user and assistant in turn, after at most one of system")
    texts = [message["content"] for message in rest]
    return Conversation(system, list(zip(texts[::2], texts[1::2])))


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f"{where}: expected an object with role and content")
    if not isinstance(message["content"], str):
        raise UserError(f"{where}: content: found {type(message['content']).__name__}, expected a text")
