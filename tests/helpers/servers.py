"""An application on a port of this machine, and an engine whose answers a test decides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fm9g.errors import UserError
from fm9g.infer.completion import Piece, TokenLogprob
from fm9g.infer.options import GenerationOptions
from fm9g.serve.server import address_of, bind


@contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """Serves an application in a thread; gives its address. port: 0: a free one."""
    import uvicorn

    listener = bind("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    started = threading.Event()
    own = server.startup

    async def startup(sockets: Any = None) -> None:
        await own(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


class FakeEngine:
    """Answers "one two three ..." a word per token. A prompt with BLOCK waits for `release`; one with FAIL fails."""

    model_names = ("base", "adapter")
    max_model_len = 50
    vocab_size = 100
    failure = ""

    def __init__(self) -> None:
        self.release, self.left, self.entered = asyncio.Event(), threading.Event(), threading.Event()
        self.num_running = self.num_waiting = 0
        self.requests: list[tuple[str, list[int], GenerationOptions]] = []
        self.chats: list[tuple[Any, Any]] = []
        self.is_closed = False

    def encode_chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        self.chats.append((messages, tools))
        if messages[-1]["content"] == "refused":
            raise UserError("chat template: roles must alternate")
        return self.encode_text(model, messages[-1]["content"])

    def encode_text(self, model: str, text: str) -> list[int]:
        return [{"BLOCK": 98, "FAIL": 99}.get(word, 1) for word in text.split()] or [1]

    def token_text(self, model: str, token_id: int) -> str:
        return f"{token_id} "

    async def stream(
        self, model: str, prompt: Sequence[int], options: GenerationOptions
    ) -> AsyncGenerator[Piece, None]:
        self.requests.append((model, list(prompt), options))
        self.num_running += 1
        try:
            for number in range(min(options.max_new_tokens, 4)):
                for index in range(options.num_return_sequences):
                    last = number == min(options.max_new_tokens, 4) - 1
                    reason = ("length" if options.max_new_tokens <= 4 else "stop") if last else ""
                    entry = TokenLogprob(number, -0.5, ((number, -0.5), (9, -1.0))[: options.logprobs or 0])
                    entries = () if options.logprobs is None else (entry,)
                    yield Piece(f"{model}{index}.{number} ", (number,), entries, reason, index)
                if 99 in prompt:
                    raise RuntimeError("out of order")
                if 98 in prompt:
                    self.entered.set()
                    await self.release.wait()
        finally:
            self.num_running -= 1
            self.left.set()

    async def close(self) -> None:
        self.is_closed = True
