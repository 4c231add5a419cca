"""Cryptographic keys over decoded media, so that caches never mistake one item for another."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def image_key(image: Image.Image, *settings: object) -> bytes:
    """32 bytes that depend on mode, size, palette, transparency and every pixel.

    settings: whatever else decides what is computed from the picture (processor settings); their
    repr must state their value, as it does for numbers, strings, tuples and dataclasses of those.
    """
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    transparency = image.info.get("transparency")
    facts = ("image", image.mode, image.size, palette, transparency, settings)
    return _digest(facts, image.tobytes())


def array_key(array: np.ndarray, *settings: object) -> bytes:
    """32 bytes that depend on dtype, shape and every value: for sounds and stacks of frames."""
    facts = ("array", array.dtype.str, array.shape, settings)
    contiguous = array if array.flags.c_contiguous else array.copy(order="C")
    return _digest(facts, contiguous.reshape(-1).view("uint8").data)


def _digest(facts: tuple[object, ...], pixels: bytes | memoryview) -> bytes:
    head = repr(facts).encode()
    # The length keeps the boundary between facts and pixels apart from their content.
    digest = hashlib.sha256(len(head).to_bytes(8, "big") + head)
    digest.update(pixels)
    return digest.digest()
