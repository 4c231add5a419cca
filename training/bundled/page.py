"""A drawn picture: where every character stands, how it is worn, and how it is cut into patches."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.bundled import fonts

PATCH = 16
CELL = 32  # pixels along one side of a merged visual token
MIN_PIXELS = 262_144
MAX_PIXELS = 655_360
SLOTS = 8  # characters labelled in one cell
PAPER_LEVEL = 32  # grey level of bare paper in a one-plane picture, so that noise can go both ways
INK_LEVEL = 223

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """Qwen2-VL's rule with this model's limits: multiples of 32 between the pixel bounds."""
    rows = round(height / CELL) * CELL
    columns = round(width / CELL) * CELL
    if rows * columns > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        rows = max(CELL, math.floor(height / beta / CELL) * CELL)
        columns = max(CELL, math.floor(width / beta / CELL) * CELL)
    elif rows * columns < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        rows = math.ceil(height * beta / CELL) * CELL
        columns = math.ceil(width * beta / CELL) * CELL
    return rows, columns


@dataclass
class Wear:
    """What happens to a picture after it is drawn."""

    angle: float = 0.0  # degrees, anticlockwise
    blur: float = 0.0  # Gaussian radius, pixels
    noise: float = 0.0  # standard deviation, grey levels
    shade: float = 0.0  # strength of a brightness ramp, 0-1
    jpeg: int = 0  # quality, 0 for none


def draw_wear(rng: Random, text_size: int, max_angle: float) -> Wear:
    """A random wear that leaves text of text_size pixels readable."""
    wear = Wear()
    if rng.random() < 0.25:
        wear.angle = rng.uniform(-1, 1) * max_angle
    if rng.random() < 0.2:
        wear.blur = rng.uniform(0.2, min(1.3, text_size / 32))
    if rng.random() < 0.25:
        wear.noise = rng.uniform(2, 14 if text_size > 18 else 10)
    if rng.random() < 0.12:
        wear.shade = rng.uniform(0.1, 0.35)
    if rng.random() < 0.2:
        wear.jpeg = rng.randint(40 if text_size > 18 else 60, 92)
    return wear


@lru_cache(maxsize=1)
def _noise_tile() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1024, 1024), dtype=np.float32)


def _add_noise(plane: Image.Image, sigma: float, rng: Random) -> Image.Image:
    pixels = np.asarray(plane)
    height, width = pixels.shape[:2]
    tile = _noise_tile()
    top, left = rng.randrange(1024 - min(height, 1023)), rng.randrange(1024 - min(width, 1023))
    noise = np.resize(tile[top : top + height, left : left + width], (height, width)) * sigma
    if pixels.ndim == 3:
        noise = noise[..., None]
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _add_shade(plane: Image.Image, strength: float, rng: Random) -> Image.Image:
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)))
    ramp = ramp.resize(plane.size, Image.Resampling.BILINEAR)
    target = Image.new(plane.mode, plane.size, rng.choice((0, 90)) if plane.mode == "L" else 0)
    return Image.composite(target, plane, ramp.point(lambda level: int(level * strength * 0.5)))


@dataclass
class Picture:
    """One finished picture. A one-plane picture holds ink strength and gets its colours last."""

    plane: Image.Image
    paper: Colour
    ink: Colour
    glyph_x: np.ndarray
    glyph_y: np.ndarray
    glyph_code: np.ndarray  # 1 for a space, up to 95 for '~'
    angle: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.plane.size

    def table(self) -> np.ndarray:
        """Colour of each level: uint8, # (3, 256)."""
        if self.plane.mode == "RGB":
            return np.tile(np.arange(256, dtype=np.uint8), (3, 1))
        share = (np.arange(256, dtype=np.float32) - PAPER_LEVEL) / (INK_LEVEL - PAPER_LEVEL)
        paper = np.array(self.paper, dtype=np.float32)[:, None]
        ink = np.array(self.ink, dtype=np.float32)[:, None]
        return np.clip(paper + share * (ink - paper) + 0.5, 0, 255).astype(np.uint8)

    def image(self) -> Image.Image:
        """The picture in colour, at its own size."""
        if self.plane.mode == "RGB":
            return self.plane
        table = self.table()
        return Image.merge("RGB", [self.plane.point(list(table[channel])) for channel in range(3)])

    def planes(self) -> np.ndarray:
        """The picture at the model's size: uint8, # (1 or 3, height, width)."""
        rows, columns = smart_resize(self.size[1], self.size[0])
        pixels = np.asarray(self.plane.resize((columns, rows), Image.Resampling.BICUBIC))
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def cells(self) -> np.ndarray:
        """Characters of each visual token in reading order: uint8, # (tokens, SLOTS), 0 = none."""
        rows, columns = smart_resize(self.size[1], self.size[0])
        across, down = columns // CELL, rows // CELL
        labels = np.zeros((across * down, SLOTS), dtype=np.uint8)
        column = (self.glyph_x * (columns / self.size[0] / CELL)).astype(np.int64)
        row = (self.glyph_y * (rows / self.size[1] / CELL)).astype(np.int64)
        inside = (column >= 0) & (column < across) & (row >= 0) & (row < down)
        cell = (row * across + column)[inside]
        order = np.argsort(cell, kind="stable")
        cell = cell[order]
        code = self.glyph_code[inside][order]
        first = np.searchsorted(cell, cell, side="left")
        slot = np.arange(len(cell)) - first
        kept = slot < SLOTS
        labels[cell[kept], slot[kept]] = code[kept]
        return labels

    def box(self, rectangle: Rectangle) -> list[int]:
        """A rectangle of the drawn page as x1, y1, x2, y2 of this picture in thousandths."""
        width, height = self.size
        x1, y1, x2, y2 = rectangle
        xs, ys = turn(np.array([x1, x2, x1, x2]), np.array([y1, y1, y2, y2]), self.angle, self.size)
        corners = (xs.min() / width, ys.min() / height, xs.max() / width, ys.max() / height)
        return [int(min(1000, max(0, round(float(value) * 1000)))) for value in corners]


def turn(
    xs: np.ndarray, ys: np.ndarray, angle: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where points go when the picture is turned about its centre (degrees, anticlockwise)."""
    if not angle:
        return xs, ys
    radians = math.radians(angle)
    cosine, sine = math.cos(radians), math.sin(radians)
    middle_x, middle_y = size[0] / 2, size[1] / 2
    dx, dy = xs - middle_x, ys - middle_y
    return middle_x + dx * cosine + dy * sine, middle_y - dx * sine + dy * cosine


@dataclass
class Page:
    """A page being drawn, with the place of each character."""

    width: int
    height: int
    paper: Colour = (255, 255, 255)
    ink: Colour = (0, 0, 0)
    colour: bool = False
    glyph_x: list[float] = field(default_factory=list)
    glyph_y: list[float] = field(default_factory=list)
    glyph_code: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        mode = "RGB" if self.colour else "L"
        self.plane = Image.new(
            mode, (self.width, self.height), self.paper if self.colour else PAPER_LEVEL
        )
        self.draw = ImageDraw.Draw(self.plane)

    def text(
        self, x: float, y: float, string: str, face: str, size: int, fill: int | Colour = INK_LEVEL
    ) -> Rectangle:
        """Draws one line with its ascender line at y; returns the line's metric box."""
        font = fonts.load(face, size)
        ascent, descent = font.getmetrics()
        left, top = round(x), round(y)
        self.draw.text((left, top), string, font=font, fill=fill)
        widths = fonts.advances(face, size)
        position = float(left)
        middle = top + ascent * 0.66
        for char in string:
            advance = widths[char]
            self.glyph_x.append(position + advance / 2)
            self.glyph_y.append(middle)
            self.glyph_code.append(ord(char) - 31)
            position += advance
        return (left, top, position, top + ascent + descent)

    def finish(self, wear: Wear, rng: Random) -> Picture:
        """Wears the page and returns the picture."""
        plane = self.plane
        if wear.angle:
            fill = self.paper if self.colour else PAPER_LEVEL
            plane = plane.rotate(wear.angle, Image.Resampling.BICUBIC, fillcolor=fill)
        if wear.shade:
            plane = _add_shade(plane, wear.shade, rng)
        if wear.blur:
            plane = plane.filter(ImageFilter.GaussianBlur(wear.blur))
        if wear.noise:
            plane = _add_noise(plane, wear.noise, rng)
        if wear.jpeg:
            buffer = io.BytesIO()
            plane.save(buffer, "JPEG", quality=wear.jpeg)
            plane = Image.open(buffer)
            plane.load()
        xs, ys = turn(
            np.array(self.glyph_x), np.array(self.glyph_y), wear.angle, (self.width, self.height)
        )
        codes = np.array(self.glyph_code, dtype=np.uint8)
        return Picture(plane, self.paper, self.ink, xs, ys, codes, wear.angle)


def colours(rng: Random) -> tuple[Colour, Colour]:
    """A paper and an ink that stand out from each other."""
    draw = rng.random()
    if draw < 0.45:
        level = rng.randint(235, 255)
        dark = rng.randint(0, 60)
        return (level, level, level), (dark, dark, dark)
    pale = tuple(rng.randint(185, 255) for _ in range(3))
    deep = [rng.randint(0, 110) for _ in range(3)]
    if rng.random() < 0.2:
        deep[rng.randrange(3)] = rng.randint(110, 200)
    while _lightness(pale) - _lightness(tuple(deep)) < 95:
        deep = [max(0, level - 25) for level in deep]
    if draw < 0.82:
        return pale, tuple(deep)  # type: ignore[return-value]
    return tuple(deep), pale  # type: ignore[return-value]


def _lightness(colour: tuple[int, ...]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def safe_angle(width: int, height: int, margin: float, limit: float = 3.0) -> float:
    """The largest turn in degrees that keeps content within its margin."""
    reach = max(width, height) / 2
    return min(limit, math.degrees(margin / reach)) if margin > 2 else 0.0
