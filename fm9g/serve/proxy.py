"""Passes requests on to a vLLM behind this server, and its answers back, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fm9g.serve.app import Backend
from fm9g.serve.disconnect import unless_client_leaves
from fm9g.serve.errors import ApiError
from fm9g.serve.limits import RETRY_SECONDS, Limits
from fm9g.serve.metrics import Metrics
from fm9g.serve.vllm_process import VllmProcess

_PASSED_ON = ("content-type", "accept")  # headers; all others are between two neighbours


def proxy_backend(process: VllmProcess, limits: Limits, max_num_seqs: int = 64) -> Backend:
    """The backend of a vLLM process that is running. max_num_seqs: answers at a time; further requests wait in vLLM."""
    client = httpx.AsyncClient(base_url=process.url, timeout=httpx.Timeout(limits.request_timeout), trust_env=False)
    running = 0

    def num_waiting() -> int:
        return max(0, running - max_num_seqs)

    async def forward(request: Request) -> Response:
        nonlocal running
        if request.method == "POST":
            limits.check_count(1, num_waiting())
        if not process.is_ready:
            problem = process.failure or "vLLM is being started again"
            raise ApiError(503, problem, retry_after=0 if process.failure else RETRY_SECONDS)
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        headers["authorization"] = f"Bearer {process.api_key}"
        body = await request.body()
        asked = client.build_request(request.method, request.url.path, headers=headers, content=body)
        running += 1
        try:
            answer = await unless_client_leaves(request, client.send(asked, stream=True))
        except httpx.TimeoutException:
            running -= 1
            raise ApiError(504, f"the answer took more than {limits.request_timeout:g} s") from None
        except httpx.HTTPError as error:
            running -= 1
            raise ApiError(503, f"vLLM does not answer: {error}", retry_after=RETRY_SECONDS) from None
        except BaseException:
            running -= 1
            raise

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal running
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:  # also when the client has left: then vLLM frees the place
                running -= 1
                await answer.aclose()

        kept = {name: answer.headers[name] for name in ("content-type", "content-encoding") if name in answer.headers}
        return StreamingResponse(chunks(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    async def more_metrics() -> bytes:
        try:
            answer = await client.get("/metrics", headers={"authorization": f"Bearer {process.api_key}"})
        except httpx.HTTPError:
            return b""
        return answer.content if answer.is_success else b""

    async def close() -> None:
        await client.aclose()
        await asyncio.to_thread(process.stop)

    def failure() -> str:
        return process.failure or ("" if process.is_ready else "vLLM is being started again")

    routes = [
        Route("/v1/models", forward),
        Route("/v1/chat/completions", forward, methods=["POST"]),
        Route("/v1/completions", forward, methods=["POST"]),
    ]
    return Backend(routes, failure, Metrics(lambda: running - num_waiting(), num_waiting), close, more_metrics)
