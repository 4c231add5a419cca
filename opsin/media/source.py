"""Turns what the user named (a path, a URL, bytes) into an open, checked, seekable binary file."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes

from opsin.errors import MediaError, UnsupportedMedia
from opsin.media.failure import reason, source_name
from opsin.media.limits import FLAGS, Deadline, MediaLimits

if TYPE_CHECKING:
    from opsin.media.fetched import FetchedCache

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(slots=True)
class Opened:
    """Media bytes ready to decode: a seekable file, its size, and how errors call it.

    `media_type` is a data URL's own, else "".
    """

    file: BinaryIO
    size: int
    name: str
    media_type: str = ""

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def open_source(
    source: Any, kind: str, limits: MediaLimits, deadline: Deadline, *, in_place: bool = False
) -> Opened:
    """Open a path, an http(s), data or file URL, or bytes, within the limits.

    in_place: a local file is read piece by piece later, so `max_bytes` does not count for it.
    What is opened already comes back as it is. Raises MediaError or a subclass.
    """
    if isinstance(source, Opened):
        return source
    start = time.perf_counter()
    name = source_name(source, kind)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, bytes | bytearray | memoryview):
        opened = _in_memory(bytes(source), name, limits)
    elif not isinstance(source, str):
        raise UnsupportedMedia(
            f"{name} was not read", why="that type is not taken", remedy=_TAKEN[kind]
        )
    elif source[:5].lower() == "data:":
        opened = _open_data_url(source, name, limits)
    else:
        opened = _open_named(source, kind, limits, deadline, in_place)
    deadline.fetch_seconds += time.perf_counter() - start
    return opened


_TAKEN = {
    "image": "Give a path, a URL, a data URL, bytes, a PIL image or a numpy array",
    "audio": "Give a path, a URL, a data URL, bytes, a numpy array or (array, sample rate)",
    "video": "Give a path, a URL, a data URL, bytes, a numpy array or a list of pictures",
    "document": "Give a path, a URL, a data URL or bytes",
}


def _in_memory(data: bytes, name: str, limits: MediaLimits, media_type: str = "") -> Opened:
    limits.check("max_bytes", len(data), name, "bytes")
    if not data:
        raise MediaError(f"{name} is empty", why="it has 0 bytes", remedy="Send the whole file")
    return Opened(io.BytesIO(data), len(data), name, media_type)


def _open_named(
    source: str, kind: str, limits: MediaLimits, deadline: Deadline, in_place: bool
) -> Opened:
    match = _SCHEME.match(source.strip())
    scheme = match[1].lower() if match else ""
    name = source_name(source, kind)
    if scheme in ("http", "https"):
        from opsin.media.fetch import fetch

        return _in_memory(fetch(source.strip(), limits, deadline), name, limits)
    if scheme == "file":
        source = _file_url_path(source.strip(), name)
    elif scheme:
        raise UnsupportedMedia(
            f"{name} was not read",
            why=f"the scheme {scheme[:20]}:// is not taken",
            remedy="Give an http(s), data or file URL, or a path",
        )
    return _open_file(source, name, kind, limits, in_place)


def open_fetched(
    url: str, kind: str, fetched: FetchedCache, salt: bytes, limits: MediaLimits, deadline: Deadline
) -> Opened:
    """Open an http(s) URL's body, from the cache where it has it."""
    start = time.perf_counter()
    name = source_name(url, kind)
    opened = _in_memory(fetched.get(url.strip(), salt, limits, deadline), name, limits)
    deadline.fetch_seconds += time.perf_counter() - start
    return opened


def is_web_url(source: Any) -> bool:
    """Whether a source is to be fetched."""
    match = _SCHEME.match(source.strip()) if isinstance(source, str) else None
    return match is not None and match[1].lower() in ("http", "https")


def data_url_parts(url: str, name: str) -> tuple[str, bool, str]:
    """Media type, whether base64, and the payload text of a data URL."""
    header, comma, payload = url[5:].partition(",")
    if not comma:
        raise MediaError(
            f"{name} is not valid",
            why="it has no comma before its data",
            remedy="Write data:image/png;base64,...",
        )
    media_type, *parameters = [part.strip().lower() for part in header.split(";")]
    return media_type, "base64" in parameters, payload


def decode_base64(text: str, name: str, limits: MediaLimits) -> bytes:
    """Bytes of base64 text (plain or URL-safe alphabet); the size is checked before decoding."""
    limits.check("max_bytes", len(text) * 3 // 4 - 2, name, "bytes")
    compact = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(
            f"{name} is not valid base64",
            why=reason(error),
            remedy="Encode the file's bytes with base64",
        ) from None


def _open_data_url(url: str, name: str, limits: MediaLimits) -> Opened:
    media_type, is_base64, payload = data_url_parts(url, name)
    if is_base64:
        if "%" in payload[:4096]:
            limits.check("max_bytes", len(payload) // 3, name, "bytes")
            payload = unquote(payload)
        data = decode_base64(payload, name, limits)
    else:
        limits.check("max_bytes", len(payload) - 2 * payload.count("%"), name, "bytes")
        data = unquote_to_bytes(payload)
    return _in_memory(data, name, limits, media_type)


def _file_url_path(url: str, name: str) -> str:
    host, slash, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise MediaError(
            f"{name} was not read",
            why="a file URL names a file of this machine",
            remedy="Write file:///absolute/path",
        )
    return "/" + unquote(path.partition("?")[0].partition("#")[0])


def _open_file(path: str, name: str, kind: str, limits: MediaLimits, in_place: bool) -> Opened:
    if not path or "\x00" in path:
        raise MediaError(
            f"{name} was not read", why="it is not a file name", remedy="Give the path of a file"
        )
    try:
        resolved = _allowed_path(path, name, limits)
        file = _open_regular(resolved)
    except FileNotFoundError:
        raise MediaError(
            f"{name} was not read", why="there is no such file", remedy="Check the path"
        ) from None
    except (OSError, RuntimeError) as error:
        raise MediaError(
            f"{name} was not read",
            why=reason(error),
            remedy=f"Give the path of a readable {kind} file",
        ) from None
    size = os.fstat(file.fileno()).st_size
    try:
        if size == 0:
            raise MediaError(f"{name} is empty", why="it has 0 bytes", remedy="Check the file")
        if not in_place:
            limits.check("max_bytes", size, name, "bytes")
    except MediaError:
        file.close()
        raise
    return Opened(file, size, name)


def _allowed_path(path: str, name: str, limits: MediaLimits) -> Path:
    """The path with every link followed, refused unless it lies under a media root."""
    if limits.media_root is None:
        return Path(path).expanduser().resolve()
    roots = [Path(root).resolve() for root in limits.media_root]
    # A relative path means one under a root, never one under the server's working folder.
    for candidate in [(root / path).resolve() for root in roots]:
        if any(candidate.is_relative_to(root) for root in roots) and candidate.exists():
            return candidate
    # The same words whether or not something is there: a reply must not reveal which files exist.
    raise MediaError(
        f"{name} was not read",
        why="there is no such file under a folder this server may read",
        remedy=f"Send the bytes or a data URL, or start the server with {FLAGS['media_root']} DIR",
        param="media_root",
    )


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a folder, device or pipe is refused without waiting on it."""

    def opener(name: str, flags: int) -> int:
        if os.name == "posix":
            flags |= os.O_NONBLOCK | os.O_NOFOLLOW
        return os.open(name, flags)

    file = open(path, "rb", opener=opener)  # noqa: SIM115  the opener; the caller closes
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    raise IsADirectoryError(21, "it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
