"""Reading a request's processor options: what cannot be meant is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.errors import InputError

# No picture is made larger than this, whatever a request asks for.
MOST_PIXELS = 1 << 26
# The most tiles that a request may have a picture cut into.
MAX_TILES = 128
# Nor all frames of a video together.
MOST_CLIP = 1 << 29


def whole_option(
    options: Mapping[str, Any],
    name: str,
    default: Any,
    low: int = 1,
    high: int = MOST_PIXELS,
) -> int:
    """A whole number from the request, between `low` and `high`, else the checkpoint's.

    Raises InputError that names it.
    """
    if options.get(name) is None:
        return int(default)
    value = options[name]
    if type(value) is not int or not low <= value <= high:
        raise InputError(
            f"{name} cannot be {value!r}",
            remedy=f"Give a whole number from {low} to {high}",
            param="processor_kwargs",
        )
    return value


def switch_option(options: Mapping[str, Any], name: str, default: Any) -> bool:
    """True or false from the request, else the checkpoint's; InputError that names it otherwise."""
    if options.get(name) is None:
        return bool(default)
    value = options[name]
    if type(value) is not bool:
        raise InputError(
            f"{name} cannot be {value!r}",
            remedy="Give true or false",
            param="processor_kwargs",
        )
    return value


def pixel_limits(
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    default: tuple[int, int],
    frames: int = 1,
) -> tuple[int, int]:
    """Fewest and most pixels of a picture, or of each frame: the request's, else the config's."""
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or default[0]
    high = config.get("max_pixels") or size.get("longest_edge") or default[1]
    room = min(MOST_PIXELS, MOST_CLIP // frames)
    return (
        whole_option(options, "min_pixels", low, high=room),
        whole_option(options, "max_pixels", high),
    )
