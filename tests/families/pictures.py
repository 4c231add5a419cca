"""Deterministic pictures and sounds for the family tests."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def picture(seed: int, width: int, height: int) -> Image.Image:
    """An RGB picture with gradients, shapes and fine grain; equal arguments give equal pixels."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, height)[:, None, None]
    columns = np.linspace(0, 1, width)[None, :, None]
    corners = rng.uniform(0, 255, (2, 3))
    pixels = corners[0] * rows + corners[1] * columns
    pixels = pixels * 0.6 + rng.uniform(0, 60, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = int(rng.integers(1, width // 2 + 2)), int(rng.integers(1, height // 2 + 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=colour)
    return image


def sound(seed: int, seconds: float, rate: int = 16_000) -> np.ndarray:
    """A mono float32 signal in [-1, 1]: a few tones that come and go over noise.  # (samples,)"""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    signal = 0.02 * rng.standard_normal(time.shape)
    for _ in range(5):
        frequency, phase = rng.uniform(80, 4000), rng.uniform(0, 6.28)
        envelope = np.clip(np.sin(rng.uniform(1, 9) * time + phase), 0, 1)
        signal += 0.15 * envelope * np.sin(2 * np.pi * frequency * time)
    return signal.clip(-1, 1).astype(np.float32)
