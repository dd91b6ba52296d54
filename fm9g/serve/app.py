"""The HTTP application: one front for every backend, with keys, limits, metrics and errors in OpenAI's shape.

create_app(routes_of_engine(engine, ...), status, ...)      the embedded backend
create_app(proxy routes, status, ...)                       another server behind it
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fm9g.printable import printable
from fm9g.serve.auth import ApiKeys
from fm9g.serve.completions import CompletionService
from fm9g.serve.engine import Engine
from fm9g.serve.errors import ApiError
from fm9g.serve.limits import Limits
from fm9g.serve.metrics import Metrics
from fm9g.serve.protocol import parse_chat, parse_completion

logger = logging.getLogger(__name__)

_OPEN_PATHS = ("/health",)
_API, _PAGE = "/v1/", "/page"


@dataclass(frozen=True)
class Backend:
    """What an application needs of whoever generates.

    Args:
        routes: of the API.
        failure: why nothing can be generated; empty while all is well.
        metrics: of this server; more_metrics: text of another server behind it.
        close: frees what it holds.
    """

    routes: Sequence[BaseRoute]
    failure: Callable[[], str]
    metrics: Metrics
    close: Callable[[], Awaitable[None]]
    more_metrics: Callable[[], Awaitable[bytes]] | None = None


def engine_backend(engine: Engine, limits: Limits, defaults: Mapping[str, Any]) -> Backend:
    """The backend of an engine in this process.

    Args:
        defaults: options of GenerationOptions for requests that do not give them.
    """
    metrics = Metrics(lambda: engine.num_running, lambda: engine.num_waiting)
    service = CompletionService(engine, limits, metrics)
    created = int(time.time())

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "fm9g",
            "max_model_len": engine.max_model_len,
        }

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [describe(name) for name in engine.model_names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in engine.model_names:
            raise ApiError(404, f"model: {name!r} is unknown", "model", "model_not_found")
        return JSONResponse(describe(name))

    async def chat(request: Request) -> Response:
        return await service.answer(parse_chat(await _json(request), defaults), request)

    async def completions(request: Request) -> Response:
        return await service.answer(parse_completion(await _json(request), defaults), request)

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    return Backend(routes, lambda: engine.failure, metrics, engine.close)


def create_app(backend: Backend, limits: Limits, keys: ApiKeys) -> FastAPI:
    """The application of a backend. Requests need one of the keys, unless there are none."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    async def health(request: Request) -> Response:
        failure = backend.failure()
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    async def metrics(request: Request) -> Response:
        more = await backend.more_metrics() if backend.more_metrics else b""
        return Response(backend.metrics.text() + more, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [Route("/health", health), Route("/metrics", metrics), *backend.routes]
    app = FastAPI(lifespan=lifespan, routes=routes, openapi_url=None, exception_handlers={
        ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug,
    })  # fmt: skip
    app.add_middleware(_Front, keys=keys, limits=limits, metrics=backend.metrics)
    return app


async def _json(request: Request) -> Any:
    try:
        text = (await request.body()).decode("utf-8")
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half of a character, written as \\ud800
        return content
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from None


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _on_api_error(
        request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    return await _on_api_error(request, ApiError(500, "the server has made a mistake; its log says more"))


class _Front:
    """Checks keys and sizes before anything else, and counts and logs requests after it."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: Limits, metrics: Metrics) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, started, status, size = scope["path"], time.monotonic(), 0, 0
        scope.setdefault("state", {})

        async def count_body() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limits.max_body_bytes:
                raise self._too_large()
            return message

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, count_body, note_status)
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, note_status)
        except ClientDisconnect:
            status = 499
        except Exception:
            status = 500  # FastAPI answers it outside of this
            raise
        finally:
            if path.startswith(_API):
                self._log(scope, path, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        if self._keys and path not in _OPEN_PATHS and not path.startswith(_PAGE):
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.accepts(key.strip()):
                raise ApiError(401, "this server needs an API key (Authorization: Bearer KEY)", code="invalid_api_key")
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._limits.max_body_bytes:,} bytes")

    def _log(self, scope: Scope, path: str, status: int, seconds: float) -> None:
        known = path if path in ("/v1/models", "/v1/chat/completions", "/v1/completions") else "other"
        self._metrics.requests.labels(known, str(status)).inc()
        self._metrics.duration.observe(seconds)
        usage = scope["state"].get("usage")
        tokens = f", {usage.prompt_tokens} + {usage.completion_tokens} tokens" if usage else ""
        logger.info(f"{scope['method']} {printable(path)} {status}{tokens}, {seconds:.2f} s")
