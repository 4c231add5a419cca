"""One call for every kind, with its timing; and keys that tell any two items apart."""

import io
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import opsin.media
from opsin.errors import InputError, MediaError
from opsin.media import MediaLimits, array_key, image_key, load, load_image
from opsin.types import Media, Text
from tests.media.samples import LOOPBACK, clip, picture, reply, saved, tone, web_server


def test_every_public_name_is_there():
    for name in opsin.media.__all__:
        assert getattr(opsin.media, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        opsin.media.nothing  # noqa: B018


def test_load_decodes_each_kind_and_times_fetch_and_decode():
    data = saved(picture(), "PNG")
    with web_server(lambda handler: reply(handler, data)) as url:
        loaded = load(Media("image", f"{url}/a.png"), LOOPBACK)
    assert loaded.value.size == (32, 24)
    assert loaded.timing.fetch > 0
    assert loaded.timing.decode > 0
    direct = load(Media("image", picture()))
    assert direct.timing.fetch == 0
    assert load(Media("audio", (tone(0.5), 44_100)), sample_rate=8_000).value.shape == (4000,)
    assert load(Media("video", clip(30)), fps=1).value.indices == (0, 29)
    asked = Media("video", clip(30), {"max_frames": 3, "fps": 30.0, "detail": "low"})
    assert len(load(asked, fps=1).value.indices) == 3


def test_unknown_kinds_and_bad_options_are_input_errors():
    with pytest.raises(InputError, match="smell is not known"):
        load(Media("smell", b"x"))
    with pytest.raises(MediaError, match="max_frames"):
        load(Media("video", clip(3), {"max_frames": 0}))


def test_row_03_a_text_part_is_not_media():
    with pytest.raises(AttributeError):
        load(Text("![x](http://a.example/x.png)"))


def variants():
    """Pictures that share their bytes and differ in one fact each."""
    raw = bytes(range(48))
    palette = Image.frombytes("P", (8, 6), raw)
    palette.putpalette(list(range(256)) * 3)
    other = palette.copy()
    other.putpalette([255 - value for value in range(256)] * 3)
    keyed = palette.copy()
    keyed.info["transparency"] = 3
    keyed_elsewhere = palette.copy()
    keyed_elsewhere.info["transparency"] = 4
    return {
        "L 8x6": Image.frombytes("L", (8, 6), raw),
        "L 6x8": Image.frombytes("L", (6, 8), raw),
        "L 48x1": Image.frombytes("L", (48, 1), raw),
        "RGB 4x4": Image.frombytes("RGB", (4, 4), raw),
        "RGB 2x8": Image.frombytes("RGB", (2, 8), raw),
        "RGBA 4x3": Image.frombytes("RGBA", (4, 3), raw),
        "CMYK 4x3": Image.frombytes("CMYK", (4, 3), raw),
        "P": palette,
        "P, other palette": other,
        "P, tRNS 3": keyed,
        "P, tRNS 4": keyed_elsewhere,
        "one pixel off": Image.frombytes("L", (8, 6), raw[:-1] + b"\0"),
    }


def test_row_04_no_two_pictures_share_a_key():
    keys = {name: image_key(image) for name, image in variants().items()}
    assert len(set(keys.values())) == len(keys)
    assert all(len(key) == 32 for key in keys.values())
    same = {name: image_key(image) for name, image in variants().items()}
    assert same == keys


def test_row_04_settings_are_part_of_the_key():
    image = picture()
    keys = [
        image_key(image),
        image_key(image, 1),
        image_key(image, "1"),
        image_key(image, 1, 2),
        image_key(image, (1, 2)),
        image_key(image, "min_pixels", 1),
        image_key(image, "min_pixels1"),
    ]
    assert len(set(keys)) == len(keys)


def test_row_04_orientation_and_transparency_reach_the_key_through_the_pixels():
    keys = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        keys.add(image_key(load_image(saved(picture(), "PNG", exif=exif))))
    assert len(keys) == 8
    palette = Image.frombytes("P", (2, 1), b"\0\1")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for key in (None, 0, 1):
        options = {} if key is None else {"transparency": key}
        keys.add(image_key(load_image(saved(palette, "PNG", **options))))
    assert len(keys) == 11
    twice = io.BytesIO(saved(picture(), "PNG")).getvalue()
    assert image_key(load_image(twice)) == image_key(load_image(picture()))


def test_row_04_arrays_differ_by_shape_and_type():
    zeros = np.zeros(24, np.uint8)
    arrays = [zeros, zeros.reshape(4, 6), zeros.view(np.uint16), zeros.view(np.int8), zeros[:23]]
    assert len({array_key(array) for array in arrays}) == len(arrays)
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert array_key(square.T) == array_key(np.ascontiguousarray(square.T)) != array_key(square)
    assert array_key(zeros, "a") != array_key(zeros)


def test_limits_are_documented_field_by_field():
    for field in fields(MediaLimits):
        assert f"{field.name}:" in MediaLimits.__doc__
