"""A model that answers at once, for the chat in the terminal."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from fm9g.errors import UserError
from fm9g.infer.completion import Piece
from fm9g.infer.options import GenerationOptions


class FakeChatModel:
    """Answers "NAME:QUESTION". A token is a word.

    Attributes:
        seen: the messages of each request.
        closed: requests that ended or were closed.
        answers: question -> pieces of its answer, or errors that are raised in their place.
    """

    def __init__(self, name: str = "fake", max_model_len: int = 1000, adapters: tuple[str, ...] = ()) -> None:
        self.name, self.max_model_len, self.adapters, self.adapter = name, max_model_len, adapters, ""
        self.seen: list[list[dict[str, str]]] = []
        self.options: list[GenerationOptions] = []
        self.answers: dict[str, list[Any]] = {}
        self.closed = 0

    def use_adapter(self, name: str) -> None:
        if name and name not in self.adapters:
            raise UserError(f"adapter {name}: unknown")
        self.adapter = name

    def count_tokens(self, messages: Any) -> int:
        return sum(len(message["content"].split()) for message in messages)

    def stream(self, messages: Any, options: GenerationOptions) -> Iterator[Piece]:
        self.seen.append([dict(message) for message in messages])
        self.options.append(options)
        question = messages[-1]["content"]
        try:
            for part in self.answers.get(question, [f"{self.name}:", question]):
                if isinstance(part, BaseException):
                    raise part
                if isinstance(part, threading.Event):
                    part.wait()
                else:
                    yield Piece(part)
            yield Piece(finish_reason="stop")
        finally:
            self.closed += 1
