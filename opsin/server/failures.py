"""Errors in each protocol's own shape: a status and a JSON body, never a traceback or a repr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opsin.errors import InputError, OpsinError

RETRY_AFTER = 1  # seconds


class Refused(OpsinError):
    """A request turned away before it is read: no key, a foreign page, too large, too slow."""

    def __init__(
        self, status: int, code: str, what: str, *, why: str = "", remedy: str = ""
    ) -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.own_status = status
        self.own_code = code


class TimedOut(OpsinError):
    """A request outlived the server's --timeout."""

    status = 504
    code = "timeout"


class BodyTooLarge(InputError):
    """A body over --max-body-bytes."""

    status = 413
    code = "body_too_large"


@dataclass(frozen=True, slots=True)
class Failure:
    """What a reply says of an error."""

    status: int
    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """An error as a reply states it; one that is not meant for users says only that it was."""
        if isinstance(error, Refused):
            return cls(error.own_status, error.own_code, error.line())
        if isinstance(error, OpsinError):
            return cls(error.status, error.code, error.line(), error.param)
        return cls(500, "internal_error", "The server failed on this request. Its log says more.")

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER)}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def openai_error(failure: Failure) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    other = "invalid_request_error" if failure.status < 500 else "server_error"
    return {
        "error": {
            "message": failure.message,
            "type": OPENAI_TYPES.get(failure.status, other),
            "param": failure.param,
            "code": failure.code,
        }
    }


def anthropic_error(failure: Failure, request_id: str = "") -> dict[str, Any]:
    """`{"type": "error", "error": {type, message}}`."""
    other = "invalid_request_error" if failure.status < 500 else "api_error"
    kind = ANTHROPIC_TYPES.get(failure.status, other)
    body = {"type": "error", "error": {"type": kind, "message": failure.message}}
    return {**body, "request_id": request_id} if request_id else body


def error_body(path: str, failure: Failure, request_id: str = "") -> dict[str, Any]:
    """An error in the shape that the path's protocol has."""
    if path.startswith("/v1/messages"):
        return anthropic_error(failure, request_id)
    return openai_error(failure)
