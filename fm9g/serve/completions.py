"""Answers of /v1/chat/completions and /v1/completions, as objects and as events.

body ─> protocol ─> Request ─> Engine.stream ─> pieces ─┬─> one object
                                                        └─> a chunk per piece, data: [DONE]
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from fm9g.errors import UserError
from fm9g.infer.completion import Piece, TokenLogprob
from fm9g.serve.disconnect import unless_client_leaves
from fm9g.serve.engine import Engine
from fm9g.serve.errors import ApiError
from fm9g.serve.limits import Limits
from fm9g.serve.metrics import Metrics
from fm9g.serve.protocol import Request


class CompletionService:
    """Answers requests by an engine.

    Args:
        metrics: counts tokens and seconds.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self._engine, self._limits, self._metrics = engine, limits, metrics

    async def answer(self, request: Request, http: HttpRequest) -> Response:
        """The response to a checked request."""
        if self._engine.failure:
            raise ApiError(503, f"nothing can be generated: {self._engine.failure}")
        model = request.model or self._engine.model_names[0]
        if model not in self._engine.model_names:
            known = ", ".join(self._engine.model_names)
            raise ApiError(404, f"model: {model!r} is unknown; this server has {known}", "model", "model_not_found")
        num_new = max(len(request.prompts), 1) * request.options.num_return_sequences
        self._limits.check_count(num_new, self._engine.num_waiting)
        prompts = self._encode(request, model)
        for prompt in prompts:
            self._check_room(prompt, request)
        shape = _Chat(model) if request.messages else _Text(model)
        usage = _Usage(prompt_tokens=sum(map(len, prompts)))
        http.state.usage = usage
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        pieces = self._pieces(model, prompts, request, usage)
        if request.stream:
            events = self._events(pieces, shape, request, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        collected: list[list[Piece]] = [[] for _ in range(num_new)]

        async def collect() -> None:
            async with aclosing(pieces):
                async for piece in pieces:
                    collected[piece.index].append(piece)

        await unless_client_leaves(http, collect())
        choices = [shape.choice(index, part, self._token_text(model)) for index, part in enumerate(collected)]
        return JSONResponse({**shape.header(shape.kind), "choices": choices, "usage": usage.to_json()})

    def _encode(self, request: Request, model: str) -> list[list[int]]:
        try:
            if request.messages:
                return [self._engine.encode_chat(model, request.messages, request.tools or None)]
            return [self._encode_prompt(prompt, model) for prompt in request.prompts]
        except UserError as error:
            raise ApiError(400, str(error), "messages" if request.messages else "prompt") from None

    def _encode_prompt(self, prompt: str | list[int], model: str) -> list[int]:
        if isinstance(prompt, str):
            return self._engine.encode_text(model, prompt)
        if not all(0 <= token < self._engine.vocab_size for token in prompt):
            raise ApiError(400, f"prompt: expected token ids below {self._engine.vocab_size}", "prompt")
        return prompt

    def _check_room(self, prompt: Sequence[int], request: Request) -> None:
        limit = self._engine.max_model_len
        new = request.options.max_new_tokens if request.max_tokens_given else 1
        if len(prompt) + new > limit:
            raise ApiError(
                400,
                f"this model's context is {limit} tokens, but the prompt has {len(prompt)} and the answer may have "
                f"{new}; shorten one of them",
                "messages" if request.messages else "prompt",
                "context_length_exceeded",
            )

    async def _pieces(
        self, model: str, prompts: Sequence[Sequence[int]], request: Request, usage: _Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all prompts, numbered through, within the time limit."""
        num_each = request.options.num_return_sequences
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        async def run(number: int, prompt: Sequence[int]) -> None:
            try:
                async with aclosing(self._engine.stream(model, prompt, request.options)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait(replace(piece, index=number * num_each + piece.index))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(run(number, prompt)) for number, prompt in enumerate(prompts)]
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout
        try:
            num_left = len(tasks)
            while num_left:
                try:
                    left = deadline - asyncio.get_running_loop().time()
                    item = await asyncio.wait_for(queue.get(), left)
                except asyncio.TimeoutError:
                    seconds = self._limits.request_timeout
                    raise ApiError(504, f"the answer took more than {seconds:g} s; ask for fewer tokens") from None
                if item is None:
                    num_left -= 1
                elif isinstance(item, UserError):
                    raise ApiError(400, str(item))
                elif isinstance(item, Exception):
                    raise ApiError(500, f"the generation failed: {item}")
                else:
                    if not usage.completion_tokens:
                        self._metrics.first_token.observe(time.monotonic() - usage.started)
                    usage.completion_tokens += len(item.token_ids)
                    self._metrics.generated_tokens.inc(len(item.token_ids))
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _events(
        self, pieces: AsyncGenerator[Piece, None], shape: _Chat | _Text, request: Request, usage: _Usage
    ) -> AsyncIterator[str]:
        with_usage = {"usage": None} if request.include_usage else {}
        header = shape.header(shape.chunk_kind)
        started: set[int] = set()
        text_of = self._token_text(shape.model)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    choice = shape.chunk(piece, piece.index not in started, text_of)
                    started.add(piece.index)
                    yield _event({**header, "choices": [choice], **with_usage})
            if request.include_usage:
                yield _event({**header, "choices": [], "usage": usage.to_json()})
        except ApiError as error:  # the status has been sent already
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    def _token_text(self, model: str) -> Any:
        return lambda token_id: self._engine.token_text(model, token_id)


@dataclass
class _Usage:
    """Tokens of a request, and when it began."""

    prompt_tokens: int
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class _Shape:
    """How an answer is written."""

    kind = chunk_kind = prefix = ""

    def __init__(self, model: str) -> None:
        self.model = model
        self._lengths: dict[int, int] = {}  # of the texts of tokens that were sent, by choice
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def header(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


class _Chat(_Shape):
    """The answer to a conversation."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, pieces: Sequence[Piece], text_of: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs([entry for piece in pieces for entry in piece.logprobs], text_of),
            "finish_reason": pieces[-1].finish_reason,
        }

    def chunk(self, piece: Piece, is_first: bool, text_of: Any) -> dict[str, Any]:
        delta = {"role": "assistant"} if is_first else {}
        return {
            "index": piece.index,
            "delta": {**delta, "content": piece.text},
            "logprobs": _chat_logprobs(piece.logprobs, text_of),
            "finish_reason": piece.finish_reason or None,
        }


class _Text(_Shape):
    """The continuation of a text."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, pieces: Sequence[Piece], text_of: Any) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": _text_logprobs([entry for piece in pieces for entry in piece.logprobs], text_of),
            "finish_reason": pieces[-1].finish_reason,
        }

    def chunk(self, piece: Piece, is_first: bool, text_of: Any) -> dict[str, Any]:
        choice = self.choice(piece.index, [piece], text_of) | {"finish_reason": piece.finish_reason or None}
        if piece.logprobs:
            sent = self._lengths.get(piece.index, 0)
            choice["logprobs"]["text_offset"] = [sent + offset for offset in choice["logprobs"]["text_offset"]]
            self._lengths[piece.index] = sent + sum(map(len, choice["logprobs"]["tokens"]))
        return choice


def _chat_logprobs(logprobs: Sequence[TokenLogprob], text_of: Any) -> dict[str, Any] | None:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = text_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    if not logprobs:
        return None
    return {
        "content": [
            entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*top) for top in item.top]}
            for item in logprobs
        ]
    }


def _text_logprobs(logprobs: Sequence[TokenLogprob], text_of: Any) -> dict[str, Any] | None:
    if not logprobs:
        return None
    tokens = [text_of(item.token_id) for item in logprobs]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [{text_of(token): logprob for token, logprob in item.top} for item in logprobs],
        "text_offset": offsets[:-1],
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
