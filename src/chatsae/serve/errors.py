"""What a client is told when a request cannot be answered, in the shape of OpenAI's errors."""

import json
from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
    503: "unavailable",
}
_LONGEST = 500  # characters of a message, which may repeat what a client sent


class ApiError(Exception):
    """A refusal with its HTTP status.

    Attributes: status, message, param (the field that it is about), code (a word for programs), headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
        self.code = code or _CODES.get(status, "invalid_request" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def facts(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def as_json(value: Any) -> bytes:
    """JSON in ASCII: half a surrogate pair in a request may come back in a message, and UTF-8 has none."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")
