"""The far side of the PDF reader: a process that draws the pages of one document, nothing else.

The first line on stdin states the limit of memory and the size of the document in bytes, which
follow it. Every further line names a page to draw; every reply is a line of JSON, and after that
of a drawn page its pixels. Nothing of Opsin is imported here: whatever a damaged document does in
this process is ended from outside.
"""

import json
import sys
from typing import Any

import pypdfium2
import pypdfium2.raw

PASSWORD = 4


def reply(fields: dict[str, Any], pixels: Any = b"") -> None:
    """One answer: a line of JSON and what follows it."""
    out = sys.stdout.buffer
    out.write(json.dumps(fields).encode() + b"\n")
    out.write(pixels)
    out.flush()


def draw(document: pypdfium2.PdfDocument, asked: dict[str, Any]) -> None:
    """Draw one page on white, 8-bit RGB; refused before drawing if it has too many pixels."""
    page = document[asked["page"]]
    try:
        points = page.get_size()
        # The size in points is rounded to single precision: without the small step down a page of
        # exactly 1240 pixels would be drawn with 1241.
        scale = asked["dpi"] / 72 * (1 - 1e-6)
        sides = [side * scale for side in points]
        if not all(0 < side < 1e7 for side in sides):
            reply({"error": "size", "width": 0, "height": 0})
            return
        width, height = (max(1, round(side + 0.499)) for side in sides)
        if width * height > asked["max_pixels"]:
            reply({"error": "pixels", "width": width, "height": height})
            return
        bitmap = page.render(scale=scale, rev_byteorder=True, fill_color=(255, 255, 255, 255))
        size = {"width": bitmap.width, "height": bitmap.height, "stride": bitmap.stride}
        reply({**size, "bytes": bitmap.stride * bitmap.height}, bitmap.buffer)
    finally:
        page.close()


def open_document(data: bytes) -> pypdfium2.PdfDocument | None:
    """The document, with forms to be drawn; None after replying why it cannot be opened."""
    try:
        document = pypdfium2.PdfDocument(data)
        document.init_forms()
    except pypdfium2.PdfiumError as error:
        locked = pypdfium2.raw.FPDF_GetLastError() == PASSWORD or "password" in str(error).lower()
        reply({"error": "password" if locked else "damaged", "message": str(error)})
        return None
    reply({"pages": len(document)})
    return document


def limit_memory(num_bytes: int) -> None:
    """Bound this process's address space, where the system knows such a limit."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def serve() -> None:
    """Answer until stdin closes."""
    stdin = sys.stdin.buffer
    start = json.loads(stdin.readline())
    limit_memory(start["memory"])
    document = open_document(stdin.read(start["size"]))
    if document is None:
        return
    for line in stdin:
        try:
            draw(document, json.loads(line))
        except pypdfium2.PdfiumError as error:
            reply({"error": "damaged", "message": str(error)})
        except MemoryError:
            reply({"error": "memory"})


if __name__ == "__main__":
    serve()
