"""Runs the application until a signal ends it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from fastapi import FastAPI

from fm9g.errors import UserError
from fm9g.serve.limits import Limits

logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0: a free one. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; give another --port (0: any free one)") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The address as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, limits: Limits, on_start: Callable[[], None] | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Then running requests may end, for `shutdown_timeout` seconds.

    A second SIGINT ends at once. on_start: called when requests are answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if on_start and not self.should_exit:
                on_start()

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.shutdown_timeout),
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    Server(config).run(sockets=[listener])
