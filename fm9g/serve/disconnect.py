"""Clients that leave before they have their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from fm9g.serve.errors import ApiError

T = TypeVar("T")
_CLIENT_LEFT = 499  # nginx's status; nobody receives it


async def unless_client_leaves(http: Request, work: Awaitable[T]) -> T:
    """The result of work, which is cancelled if the client closes its connection."""
    task = asyncio.ensure_future(work)

    async def client_leaves() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(client_leaves())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(_CLIENT_LEFT, "the client left")
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
