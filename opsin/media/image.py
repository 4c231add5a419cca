"""Reads a picture from anything a user may give, within limits, as upright opaque RGB."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image, features

from opsin.errors import MediaError, MediaTooLarge, UnsupportedMedia
from opsin.media.failure import CORRUPT, reason, source_name
from opsin.media.formats import HEADER_BYTES, PILLOW_MODULES, image_format, not_an_image
from opsin.media.limits import DEFAULT_LIMITS, Deadline, MediaLimits
from opsin.media.pixels import array_to_rgb, to_rgb
from opsin.media.source import Opened, open_source
from opsin.media.worker import WORKERS

if TYPE_CHECKING:
    import numpy as np

_FEATURES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
_INSTALL = {"HEIF": "install pillow-heif"}


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A picture's header: Pillow's format name, stored size (before orientation), stored mode."""

    format: str
    width: int
    height: int
    mode: str


def load_image(source: Any, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as RGB: first frame, EXIF orientation applied, transparency onto white.

    source: a path, an http(s), data or file URL, bytes, a PIL image, or a numpy array of
    (height, width), (height, width, 1 | 3 | 4) or (3, height, width). The result is a new image
    without metadata, so nothing can orient it twice. Raises MediaError or a subclass.
    """
    deadline = Deadline(limits.deadline)
    what = source_name(source, "image")
    return WORKERS.run(lambda: decode_image(source, limits, deadline), deadline, what)


def probe_image(source: Any, limits: MediaLimits = DEFAULT_LIMITS) -> ImageInfo:
    """The header of a path, URL or bytes, checked against the limits; no pixel is decoded."""
    deadline = Deadline(limits.deadline)

    def work() -> ImageInfo:
        with open_source(source, "image", limits, deadline) as opened:
            image = open_checked(opened, limits)
            return ImageInfo(image.format or "", image.width, image.height, image.mode)

    return WORKERS.run(work, deadline, source_name(source, "image"))


def decode_image(source: Any, limits: MediaLimits, deadline: Deadline) -> Image.Image:
    """`load_image` without its worker thread, for callers that already run in one."""
    if isinstance(source, Image.Image):
        return _from_pil(source, limits)
    if is_array(source):
        return _from_array(source, limits)
    with open_source(source, "image", limits, deadline) as opened:
        return _decode_opened(opened, limits, deadline)


def _decode_opened(opened: Opened, limits: MediaLimits, deadline: Deadline) -> Image.Image:
    """The picture in an opened file, as RGB."""
    with corrupt_as_media_error(opened.name):
        image = open_checked(opened, limits)
        image.load()
        # Some formats only learn their true size while decoding.
        limits.check("max_pixels", image.width * image.height, opened.name, "pixels")
        deadline.check(opened.name)
        return to_rgb(image)


def open_checked(opened: Opened, limits: MediaLimits) -> Image.Image:
    """The picture with its header read and its size within the limits, nothing decoded."""
    opened.file.seek(0)
    head = opened.file.read(HEADER_BYTES)
    name = image_format(head)
    if name is None:
        raise not_an_image(head, opened.name)
    _register(name, opened.name)
    opened.file.seek(0)
    with corrupt_as_media_error(opened.name):
        image = _construct(name, opened.file)
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(
            f"{opened.name} has no pixels",
            why=f"its size is {width}x{height}",
            remedy="Send a picture of at least 1x1",
        )
    if width * height > limits.max_pixels:
        raise limits.exceeded(
            "max_pixels", opened.name, f"{width}x{height} = {width * height:,} pixels", "pixels"
        )
    return image


def _construct(name: str, file: BinaryIO) -> Image.Image:
    # Image.open would apply Pillow's process-wide pixel limit, whatever the operator has set here.
    factory, _ = Image.OPEN[name]
    return factory(file, "")


def _register(name: str, what: str) -> None:
    """Import the Pillow plugin of one format; UnsupportedMedia where this Pillow lacks it."""
    if name not in Image.OPEN:
        try:
            module = importlib.import_module(PILLOW_MODULES[name])
            if name == "HEIF":
                module.register_heif_opener()
        except ImportError:
            pass
    absent = name not in Image.OPEN or (name in _FEATURES and not features.check(_FEATURES[name]))
    if absent:
        raise UnsupportedMedia(
            f"{what} was not read",
            why=f"it is {name}, which the installed Pillow does not decode",
            remedy=f"Convert it to JPEG or PNG, or {_INSTALL.get(name, 'install a full Pillow')}",
        )


@contextmanager
def corrupt_as_media_error(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises on damaged input into a MediaError that names the media."""
    try:
        yield
    except Image.DecompressionBombError:
        raise MediaTooLarge(
            f"{name} is too large",
            why="its frames have more pixels than Pillow's MAX_IMAGE_PIXELS allows",
            remedy="Send a smaller one",
            param="max_pixels",
        ) from None
    except CORRUPT as error:
        raise MediaError(
            f"{name} cannot be decoded",
            why=f"it is damaged or incomplete ({reason(error)})",
            remedy="Check that the whole file was sent, or save it again as PNG or JPEG",
        ) from None


def _from_pil(source: Image.Image, limits: MediaLimits) -> Image.Image:
    name = source_name(source, "image")
    limits.check("max_pixels", source.width * source.height, name, "pixels")
    if source.width < 1 or source.height < 1:
        raise MediaError(f"{name} has no pixels", remedy="Send a picture of at least 1x1")
    with corrupt_as_media_error(name):
        source.load()
        return to_rgb(source)


def _from_array(source: np.ndarray, limits: MediaLimits) -> Image.Image:
    name = source_name(source, "image")
    limits.check("max_pixels", source.size // 4, name, "pixels")
    pixels = array_to_rgb(source, name)
    limits.check("max_pixels", pixels.shape[0] * pixels.shape[1], name, "pixels")
    return Image.fromarray(pixels, "RGB")


def is_array(source: Any) -> bool:
    """Whether `source` is a numpy array, without importing numpy to find out."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(source, numpy.ndarray)
