"""Tells what bytes are from their first ones, and names the remedy for what is not decoded."""

from __future__ import annotations

from opsin.errors import MediaError, UnsupportedMedia

HEADER_BYTES = 512

# Pillow's format name -> the module that registers it. Formats that run other programs (EPS), nest
# files of unchecked size (ICO, ICNS) or have no signature (TGA) are left out on purpose.
PILLOW_MODULES = {
    "JPEG": "PIL.JpegImagePlugin",
    "PNG": "PIL.PngImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "HEIF": "pillow_heif",
    "PPM": "PIL.PpmImagePlugin",
    "JPEG2000": "PIL.Jpeg2KImagePlugin",
    "QOI": "PIL.QoiImagePlugin",
    "PSD": "PIL.PsdImagePlugin",
    "PCX": "PIL.PcxImagePlugin",
    "SGI": "PIL.SgiImagePlugin",
}
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"qoif", "QOI"),
    (b"8BPS", "PSD"),
    (b"\x01\xda", "SGI"),
    (b"\x0a\x05\x01", "PCX"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_OTHERS = (
    (b"%PDF", "a PDF document", "Run `opsin ocr` on it, or send it as a file part"),
    (b"%!PS", "PostScript", "Convert it to PNG"),
    (b"\x00\x00\x01\x00", "an icon file", "Convert it to PNG"),
    (b"icns", "an icon file", "Convert it to PNG"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video", "Pass it as a video"),
    (b"OggS", "Ogg audio or video", "Pass it as audio or as a video"),
    (b"fLaC", "FLAC audio", "Pass it as audio"),
    (b"ID3", "MP3 audio", "Pass it as audio"),
    (
        b"PK\x03\x04",
        "a ZIP archive or office document",
        "Unpack it, or export its pages as pictures",
    ),
    (b"\x1f\x8b", "a gzip file", "Unpack it"),
)


def image_format(head: bytes) -> str | None:
    """Pillow's name for the picture format that starts with `head`, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _ftyp_format(head)
    if len(head) > 2 and head[0:1] == b"P" and head[1] in b"1234567fF" and head[2] in b" \t\r\n":
        return "PPM"
    return next((name for magic, name in _SIGNATURES if head.startswith(magic)), None)


def _ftyp_format(head: bytes) -> str | None:
    # The brand list tells AVIF from HEIC when the major brand is the shared "mif1".
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return "HEIF" if brands[0] in _HEIF_BRANDS else None


def not_an_image(head: bytes, name: str) -> MediaError:
    """The error for bytes that are no picture, saying what they look like instead."""
    for magic, label, remedy in _OTHERS:
        if head.startswith(magic):
            return UnsupportedMedia(f"{name} is not a picture", why=f"it is {label}", remedy=remedy)
    if head[4:8] == b"ftyp":
        return UnsupportedMedia(
            f"{name} is not a picture", why="it is an MP4 or MOV file", remedy="Pass it as a video"
        )
    if head[:4] == b"RIFF":
        return UnsupportedMedia(
            f"{name} is not a picture",
            why="it is a WAV or AVI file",
            remedy="Pass it as audio or as a video",
        )
    return _text_or_unknown(head, name)


def _text_or_unknown(head: bytes, name: str) -> MediaError:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in start:
        return UnsupportedMedia(
            f"{name} is not a picture of pixels", why="it is SVG", remedy="Convert it to PNG"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return UnsupportedMedia(
            f"{name} is not a picture",
            why="it is a web page",
            remedy="Give the URL of the picture itself",
        )
    if b"\x00" not in head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return UnsupportedMedia(
            f"{name} is not a picture", why="it is text", remedy="Give a JPEG, PNG or WebP file"
        )
    return UnsupportedMedia(
        f"{name} is not a picture",
        why="its first bytes are of no known picture format",
        remedy="Give a JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF file",
    )
