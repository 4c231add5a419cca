"""From an answer to regions in pixels of the original pictures, undoing what the family did to
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from opsin.families.base import Family, MediaInput
from opsin.grounding.patch_points import joined_metadata
from opsin.grounding.patch_points import parse as parse_patch_points
from opsin.grounding.regions import Region
from opsin.grounding.syntax import PATCH_POINTS, SYNTAXES
from opsin.types import Frame, Grounding

Size = tuple[int, int]
# What a family leaves in MediaInput.details, if a plain resize is not all it does.
FRAME = "frame"
POINTING = "pointing"


class Decoder(Protocol):
    """Turns token ids into text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""


class Source(Protocol):
    """What `parse` needs of a processor."""

    @property
    def family(self) -> Family:
        """The family that states how it writes regions."""

    @property
    def tokenizer(self) -> Decoder:
        """The tokenizer of its checkpoint."""


def parse(
    text_or_tokens: str | Sequence[int],
    processor: Source,
    image_size: Size | Sequence[Size],
    *,
    grounding: Sequence[Grounding] = (),
    options: Mapping[str, Any] | None = None,
) -> list[Region]:
    """The boxes, points and polygons of an answer, in pixels of the original pictures.

    image_size: the original's (width, height), or those of several pictures in their order.
    Token ids are better than text: in text, tags may be gone. `grounding` reads another syntax than
    the family's own; `options` are the processor options that the pictures were prepared with.
    A family that grounds nothing gives no regions.
    """
    sizes = _sizes(image_size)
    blanks = [Image.new("RGB", size) for size in sizes]
    media = [processor.family.prepare_image(blank, options or {}) for blank in blanks]
    for item, size in zip(media, sizes, strict=True):
        item.size = size
    return regions_of(text_or_tokens, processor, media, grounding)


def _sizes(value: Any) -> list[Size]:
    """One size or several as a list."""
    one = len(value) == 2 and all(isinstance(side, int) for side in value)
    return [(value[0], value[1])] if one else [(width, height) for width, height in value]


def regions_of(
    text_or_tokens: str | Sequence[int],
    processor: Source,
    media: Sequence[MediaInput],
    grounding: Sequence[Grounding] = (),
) -> list[Region]:
    """The regions of an answer about media that were prepared already.

    Of several groundings the first that finds something is taken.
    """
    pictures = [item for item in media if item.kind == "image"]
    ways = grounding or processor.family.grounding
    if not pictures or not ways:
        return []
    if isinstance(text_or_tokens, str):
        text = text_or_tokens
    else:
        written = processor.family.written(text_or_tokens)
        text = written or processor.tokenizer.decode(text_or_tokens, skip_special_tokens=False)
    for way in ways:
        found = _read(text, way, pictures)
        if found:
            return found
    return []


def _read(text: str, grounding: Grounding, pictures: Sequence[MediaInput]) -> list[Region]:
    """The regions that one syntax finds; those that name a picture that is not there are left
    out.
    """
    if grounding.syntax == PATCH_POINTS:
        return parse_patch_points(text, pointing_metadata(pictures))
    found = SYNTAXES[grounding.syntax](text)
    frames = [frame_of(picture) for picture in pictures]
    return [
        placed(region, grounding, frames[region.image_index], pictures[region.image_index].size)
        for region in found
        if region.image_index < len(pictures)
    ]


def pointing_metadata(media: Sequence[MediaInput]) -> dict[str, Any] | None:
    """What the numbers of a pointing answer mean for a prompt's media; None if nothing."""
    return joined_metadata([item.details[POINTING] for item in media if POINTING in item.details])


def frame_of(item: MediaInput) -> Frame:
    """How what the tower sees lies on the original: as the family says, else all of it, resized."""
    frame = item.details.get(FRAME)
    return frame if isinstance(frame, Frame) else Frame(*item.processed_size)


def placed(region: Region, grounding: Grounding, frame: Frame, size: Size) -> Region:
    """A region in a model's units as one in pixels of the original, inside its borders."""
    wide, high = grounding.span or frame.width, grounding.span or frame.height

    def move(x: float, y: float) -> tuple[float, float]:
        across = frame.left + x / wide * (frame.right - frame.left)
        down = frame.top + y / high * (frame.bottom - frame.top)
        return min(max(across, 0.0), 1.0) * size[0], min(max(down, 0.0), 1.0) * size[1]

    return dataclasses.replace(region.mapped(move), image_size=size)
