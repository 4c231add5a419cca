"""What can go wrong for a user: each error says what happened, why, and the remedy.

OpsinError
├── InputError          the request cannot be answered as it stands           (exit 2, HTTP 400)
│   ├── MediaError      a picture, sound or video cannot be used              (400)
│   │   ├── MediaTooLarge       over a stated budget                          (413)
│   │   ├── UnsupportedMedia    a format nothing here decodes                 (415)
│   │   └── MediaTimeout        fetching or decoding outlived its deadline    (408)
│   └── PromptTooLong   more tokens than the model or the cache holds         (400)
├── NotFoundError       no such model, file or route                          (exit 3, HTTP 404)
├── CheckpointError     a checkpoint folder that cannot be loaded as it is    (exit 4, HTTP 422)
│   └── UnknownFamily   its model_type is not one Opsin knows
├── MissingDependency   an optional package, compiler or driver is not there  (exit 5, HTTP 501)
└── EngineError         the engine cannot take or finish the request now      (exit 6, HTTP 503)
    └── QueueFull       too many requests are waiting                         (HTTP 429)
"""

from typing import ClassVar


class OpsinError(Exception):
    """Base of every error meant for the user.

    `what` states what failed, `why` the cause, `remedy` what to do about it; the same one line is
    printed on the command line and sent in JSON. `param` names the field or flag at fault.
    """

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, what: str, *, why: str = "", remedy: str = "", param: str | None = None
    ) -> None:
        self.what = what
        self.why = why
        self.remedy = remedy
        self.param = param
        super().__init__(self.line())

    def line(self) -> str:
        """The whole message on one line: `what: why. remedy.`"""
        head = f"{self.what}: {self.why}" if self.why else self.what
        parts = [" ".join(part.split()).rstrip(".") for part in (head, self.remedy) if part]
        return ". ".join(parts) + "."


class InputError(OpsinError):
    """The request cannot be answered as it stands."""

    exit_code = 2
    status = 400
    code = "invalid_request"


class MediaError(InputError):
    """A picture, sound or video cannot be used."""

    code = "invalid_media"


class MediaTooLarge(MediaError):
    """Media over a stated budget (bytes, pixels, frames or seconds)."""

    status = 413
    code = "media_too_large"


class UnsupportedMedia(MediaError):
    """Media in a format that nothing here decodes."""

    status = 415
    code = "unsupported_media"


class MediaTimeout(MediaError):
    """Fetching or decoding outlived its deadline."""

    status = 408
    code = "media_timeout"


class PromptTooLong(InputError):
    """More tokens than the model's context or the KV cache holds."""

    code = "context_length_exceeded"


class NotFoundError(OpsinError):
    """No such model, file or route."""

    exit_code = 3
    status = 404
    code = "not_found"


class CheckpointError(OpsinError):
    """A checkpoint folder that cannot be loaded as it is."""

    exit_code = 4
    status = 422
    code = "invalid_checkpoint"


class UnknownFamily(CheckpointError):
    """A checkpoint whose `model_type` is not one Opsin knows."""

    code = "unknown_family"


class MissingDependency(OpsinError):
    """An optional package, compiler or driver is not there."""

    exit_code = 5
    status = 501
    code = "missing_dependency"


class EngineError(OpsinError):
    """The engine cannot take or finish the request now."""

    exit_code = 6
    status = 503
    code = "unavailable"


class QueueFull(EngineError):
    """Too many requests are waiting."""

    status = 429
    code = "queue_full"
