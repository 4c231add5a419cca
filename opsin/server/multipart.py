"""Reads a multipart/form-data body that is already whole and bounded."""

from __future__ import annotations

import re
from dataclasses import dataclass

from opsin.errors import InputError

MAX_PARTS = 32
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,200})"|([^;\s"]{1,200}))', re.IGNORECASE)
_NAME = re.compile(r';\s*name="([^"\r\n]{0,100})"', re.IGNORECASE)
_FILENAME = re.compile(r';\s*filename="([^"\r\n]{0,255})"', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FormPart:
    """One field of a form; a file has a file name."""

    name: str
    data: bytes
    filename: str | None = None

    @property
    def text(self) -> str:
        """The field as text."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.name} is not UTF-8 text", param=self.name) from None


def parse_form(content_type: str, body: bytes) -> list[FormPart]:
    """The fields of a form, in order; InputError where the body is none."""
    match = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/form-data") or match is None:
        raise InputError(
            "The body is not a form",
            remedy="Send multipart/form-data, as OpenAI's clients do",
        )
    boundary = b"--" + (match[1] or match[2]).encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n" + boundary, MAX_PARTS + 2)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise InputError("The form is cut off", why=f"or has more than {MAX_PARTS} fields")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> FormPart:
    head, gap, data = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    lines = head.decode("utf-8", "replace").split("\r\n")
    said = next((line for line in lines if line.lower().startswith("content-disposition:")), "")
    name, filename = _NAME.search(said), _FILENAME.search(said)
    if not gap or name is None:
        raise InputError("A field of the form has no name")
    return FormPart(name[1], data, filename[1] if filename else None)
