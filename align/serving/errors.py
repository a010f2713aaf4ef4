"""Refusals in OpenAI's JSON form, with the status codes that its clients know."""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """A request that is refused; `param` names the part of it, such as "messages[0].content[1]"."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.kind = message, status, param, code, kind

    @property
    def body(self) -> dict[str, Any]:
        """What clients parse."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def encoded(self) -> bytes:
        """`body` as bytes."""
        return json.dumps(self.body).encode()


def unavailable(message: str) -> ApiError:
    """The server cannot answer now, and it is not the request's fault."""
    return ApiError(message, 503, kind="server_error", code="unavailable")
