"""Words for media that fail: a name for what the user gave, and a reason free of object reprs."""

from __future__ import annotations

import os
import re
import struct
import zlib
from typing import Any

# What decoders raise on damaged input; each is turned into a MediaError where it is caught.
CORRUPT: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)

_REPR = re.compile(r"<[^<>]*>|\b0x[0-9a-fA-F]+|\[Errno -?\d+\]|: returned -?\d+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_USERINFO = re.compile(r"//[^/?#]*@")


def _short(text: str, length: int = 200) -> str:
    clean = _CONTROL.sub(" ", text)
    return clean if len(clean) <= length else clean[: length - 3] + "..."


def reason(error: BaseException) -> str:
    """One line of what a decoder said, without object reprs or addresses."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(_REPR.sub("", text).replace("''", "").split()).rstrip(" :.")
    return _short(text) or type(error).__name__


def source_name(source: Any, kind: str) -> str:
    """What to call a source in a message: its path, its URL without credentials, or its type."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the {kind} given as {len(source):,} bytes"
    if not isinstance(source, str):
        return f"the {kind} given as {type(source).__name__}"
    if source[:5].lower() == "data:":
        media_type = source[5:100].partition(",")[0].partition(";")[0] or "no media type"
        return f"the data URL of {_short(media_type, 60)}"
    if "://" in source[:20]:
        # The query may hold a signature or a key: it stays out of messages and logs.
        return _short(_USERINFO.sub("//", source.partition("#")[0].partition("?")[0]))
    return f"{kind} file {_short(source)}" if source else f"the {kind} with an empty name"
