"""Turns pixels of every mode and array layout into upright, opaque, 8-bit RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from opsin.errors import MediaError, UnsupportedMedia
from opsin.media.failure import CORRUPT

if TYPE_CHECKING:
    import numpy as np

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image of a loaded one: upright, flattened onto white, without metadata.

    16-bit samples keep their high byte. 32-bit integers and floats: see `_wide`.
    """
    orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        flat = _wide(image)
    elif image.has_transparency_data:
        flat = _flatten(image)
    elif image.mode == "RGB":
        flat = image.copy()
    else:
        flat = image.convert("RGB")
    # Whoever gets this image must find no orientation left to apply.
    flat.info = {}
    transpose = _UPRIGHT.get(orientation)
    return flat if transpose is None else flat.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation 1 to 8; damaged metadata does not spoil a good picture."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except CORRUPT:
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # A 16-bit PNG states its transparent colour at 16 bits; Pillow kept the high bytes only.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image if image.mode == "RGBA" else _to_rgba(image)
    white = Image.new("RGBA", rgba.size, _WHITE)
    white.alpha_composite(rgba)
    return white.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        return image.convert("LA").convert("RGBA")
    return image.convert("RGBA")


def _wide(image: Image.Image) -> Image.Image:
    """Modes I;16 (fixed range), I and F: the range that holds the values is scaled to 0..255.

    I: 0..255 stays, 0..65535 keeps its high byte, anything else is stretched from its least to its
    greatest value. F: 0..1 and 0..255 are taken as such, anything else is stretched.
    """
    import numpy as np

    samples = np.asarray(image)
    gray = _scaled(samples)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray = np.where(samples == key, np.uint8(255), gray)
    return Image.fromarray(gray, "L").convert("RGB")


def _scaled(samples: np.ndarray) -> np.ndarray:
    import numpy as np

    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == np.bool_:
        return samples.astype(np.uint8) * np.uint8(255)
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        return (samples >> 8).astype(np.uint8)
    values = np.nan_to_num(samples.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if samples.dtype.kind == "f" and low >= 0 and high <= 1:
        values = values * 255
    elif low >= 0 and high <= 255:
        pass
    elif low >= 0 and high <= 65535 and samples.dtype.kind != "f":
        values = values // 256
    else:
        values = (values - low) * 255 / (high - low) if high > low else values * 0
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def array_to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 (height, width, 3) of an array of one picture; transparency onto white.

    Takes (height, width), (height, width, 1 | 2 | 3 | 4) and, when the last axis is none of those,
    (1 | 2 | 3 | 4, height, width), of bool, integers or floats (0..1, or 0..255).
    """
    import numpy as np

    if array.dtype.kind not in "buif":
        raise UnsupportedMedia(
            f"{name} is no picture",
            why=f"its dtype is {array.dtype}",
            remedy="Give uint8 or floats from 0 to 1",
        )
    if array.ndim == 3 and array.shape[2] > 4 and array.shape[0] <= 4:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or 0 in array.shape:
        raise MediaError(
            f"{name} is no picture",
            why=f"its shape is {tuple(array.shape)}",
            remedy="Give (height, width) or (height, width, 3)",
        )
    samples = _scaled(array)
    channels = samples.shape[2]
    if channels in (1, 3):
        rgb = np.broadcast_to(samples, (*samples.shape[:2], 3))
        return np.ascontiguousarray(rgb)
    colour = np.broadcast_to(samples[:, :, :-1], (*samples.shape[:2], 3)).astype(np.uint16)
    alpha = samples[:, :, -1:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
