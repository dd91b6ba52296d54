"""Errors in the shape of the OpenAI API, which its clients turn into exceptions."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        param: the field of the request that is wrong.
        code: a word for programs.
        retry_after: seconds after which the client may try again; 0: not said.
    """

    def __init__(self, status: int, message: str, param: str = "", code: str = "", retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param or None, "code": self.code or None}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers | ({"Retry-After": str(self.retry_after)} if self.retry_after else {})
