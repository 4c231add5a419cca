"""Pictures of every format, mode and source come out as upright opaque RGB."""

import base64
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from opsin.errors import MediaError, UnsupportedMedia
from opsin.media.image import load_image, probe_image
from opsin.media.limits import MediaLimits
from tests.media.samples import picture, saved

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "QOI", "PCX", "SGI", "JPEG2000"]
if features.check("avif"):
    FORMATS.append("AVIF")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
CORNERS = ((1, 1), (-2, 1), (1, -2), (-2, -2))


def corners(image):
    """The main colour at upper left, upper right, lower left, lower right: r, g, b or w."""
    pixels = np.asarray(image)
    found = ""
    for x, y in CORNERS:
        colour = pixels[y, x]
        found += "w" if colour.min() > 180 else "rgb"[int(colour.argmax())]
    return found


def pixel(image, x=0, y=0):
    return tuple(int(value) for value in np.asarray(image)[y, x])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_to_the_same_picture(name):
    options = {"lossless": True} if name in ("WEBP",) else {}
    image = load_image(saved(picture(), name, **options))
    assert (image.mode, image.size, corners(image)) == ("RGB", (32, 24), "rgbw")
    error = np.abs(np.asarray(image).astype(int) - np.asarray(picture()).astype(int)).mean()
    assert error < (8 if name in ("JPEG", "AVIF", "JPEG2000") else 1)


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    data = saved(picture(), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    percent = "".join(f"%{byte:02x}" for byte in data)
    sources = [
        path,
        str(path),
        path.as_uri(),
        data,
        bytearray(data),
        memoryview(data),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=x;BASE64,{text.rstrip('=')}",
        "data:;base64," + text.replace("+", "-").replace("/", "_"),
        f"data:image/png,{percent}",
        picture(),
        np.asarray(picture()),
        np.asarray(picture()).transpose(2, 0, 1),
        np.asarray(picture()).astype(np.float32) / 255,
        np.asarray(picture()).astype(np.uint16) << 8,
    ]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_row_11_orientation_is_applied_exactly_once(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(64, 48), name, exif=exif)
    seen = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}
    image = load_image(data)
    assert corners(image) == seen[orientation]
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    assert image.getexif().get(0x0112) is None
    again = load_image(image)
    assert np.array_equal(np.asarray(again), np.asarray(image))
    opened = Image.open(io.BytesIO(data))
    assert corners(load_image(opened)) == seen[orientation]


def test_row_11_damaged_exif_does_not_spoil_the_picture():
    for exif in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00"):
        assert corners(load_image(saved(picture(), "JPEG", exif=exif))) == "rgbw"
    exif = Image.Exif()
    exif[0x0112] = 77
    assert load_image(saved(picture(), "JPEG", exif=exif)).size == (32, 24)


def translucent(mode):
    image = Image.new(mode, (2, 1))
    clear, solid = {"RGBA": ((9, 9, 9, 0), (200, 0, 0, 128)), "LA": ((9, 0), (100, 128))}[mode]
    image.putpixel((0, 0), clear)
    image.putpixel((1, 0), solid)
    return image


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", (227, 127, 127)), ("LA", (177, 177, 177))])
def test_row_11_alpha_goes_onto_white(mode, expected):
    image = load_image(saved(translucent(mode), "PNG"))
    assert pixel(image, 0) == (255, 255, 255)
    assert np.abs(np.subtract(pixel(image, 1), expected)).max() <= 1
    direct = load_image(np.asarray(translucent(mode)))
    assert np.abs(np.subtract(np.asarray(direct), np.asarray(image, dtype=int))).max() <= 1


def test_row_11_palette_and_colour_key_transparency_go_onto_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixel(load_image(saved(palette, "PNG")), 1) == (40, 50, 60)
    image = load_image(saved(palette, "PNG", transparency=0))
    assert [pixel(image, x) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    image = load_image(saved(palette, "PNG", transparency=b"\xff\x00"))
    assert [pixel(image, x) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    assert pixel(load_image(saved(palette, "GIF", transparency=1)), 1) == (255, 255, 255)
    for mode, key, clear in (("RGB", (1, 2, 3), (1, 2, 3)), ("L", 7, 7), ("1", 0, 0)):
        keyed = Image.new(mode, (2, 1), clear)
        keyed.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 255)
        image = load_image(saved(keyed, "PNG", transparency=key))
        assert pixel(image, 0) == (255, 255, 255)
        assert pixel(image, 1) == ((9, 9, 9) if mode == "RGB" else (255, 255, 255))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "PA",
                                  "RGBX", "RGBa", "La"])  # fmt: skip
def test_every_mode_of_a_pil_image_is_taken_and_left_as_it_was(mode):
    if mode in ("RGBa", "La"):
        source = Image.new(mode[:-1].upper() + "A", (3, 2)).convert(mode)
    else:
        source = Image.new(mode, (3, 2))
    before = source.tobytes()
    image = load_image(source)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert source.tobytes() == before
    assert image is not source


def test_sixteen_bits_keep_their_high_byte():
    values = np.array([[0, 255, 256, 0x80FF, 65535]], np.uint16)
    for data in (
        saved(Image.fromarray(values), "PNG"),
        saved(Image.fromarray(values), "TIFF"),
        Image.fromarray(values),
        values,
    ):
        assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width, height, depth, colour, rows, *extra):
    """A PNG of raw scanlines, for what Pillow cannot write and for headers that lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def test_sixteen_bit_colour_keys_become_white():
    gray = raw_png(2, 1, 16, 0, b"\0\x12\x34\x80\x00", png_chunk(b"tRNS", b"\x12\x34"))
    assert [pixel(load_image(gray), x)[0] for x in (0, 1)] == [255, 128]
    row = b"\0" + b"\x12\x34\x12\x34\x12\x34" + b"\x80\x00" * 3
    colour = raw_png(2, 1, 16, 2, row, png_chunk(b"tRNS", b"\x12\x34" * 3))
    assert [pixel(load_image(colour), x)[0] for x in (0, 1)] == [255, 128]


def test_wide_integers_and_floats_scale_to_their_range():
    def levels(values, mode):
        image = Image.fromarray(np.array([values], {"I": np.int32, "F": np.float32}[mode]))
        assert image.mode == mode
        return np.asarray(load_image(image))[0, :, 0].tolist()

    assert levels([0, 100, 255], "I") == [0, 100, 255]
    assert levels([0, 256, 65535], "I") == [0, 1, 255]
    assert levels([-100, 0, 100], "I") == [0, 128, 255]
    assert levels([0, 0.5, 1], "F") == [0, 128, 255]
    assert levels([0, 2, 255], "F") == [0, 2, 255]
    assert levels([-1, 0, 1], "F") == [0, 128, 255]
    assert levels([float("nan"), float("inf"), 1], "F") == [0, 0, 255]


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_the_picture(name):
    others = [Image.new("RGB", (32, 24), (9, 9, 9))]
    data = saved(picture(), name, save_all=True, append_images=others)
    assert corners(load_image(data)) == "rgbw"


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2000, 10), (7, 3)])
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF"])
def test_row_10_tiny_and_thin_pictures_decode(name, size):
    assert load_image(saved(Image.new("RGB", size), name)).size == size
    assert load_image(Image.new("L", size)).size == size
    assert load_image(np.zeros((size[1], size[0]), np.uint8)).size == size


def test_probe_reads_the_header_only():
    data = saved(picture(), "PNG")
    info = probe_image(data[:60])
    assert (info.format, info.width, info.height, info.mode) == ("PNG", 32, 24, "RGB")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"shape is \(0, 4, 3\)"),
        (np.zeros((9, 9, 7), np.uint8), "shape"),
        (np.zeros((2, 2, 2, 3), np.uint8), "shape"),
        (np.zeros((4, 4), np.complex64), "dtype is complex64"),
        (np.array([["a"]]), "dtype"),
    ],
)
def test_arrays_that_are_no_pictures_say_why(array, words):
    with pytest.raises(MediaError, match=words):
        load_image(array)


@pytest.mark.parametrize("source", [None, 5, object(), {"url": "x"}, ["a"], 1.5])
def test_row_09_other_objects_are_refused_by_type_without_a_repr(source):
    with pytest.raises(UnsupportedMedia) as caught:
        load_image(source)
    assert type(source).__name__ in caught.value.line()
    assert "0x" not in caught.value.line()


def test_importing_the_picture_reader_loads_no_heavy_package():
    code = (
        "import sys, opsin.media, opsin.media.image\n"
        "heavy = {'httpx', 'httpcore', 'av', 'numpy', 'soundfile', 'soxr', 'ssl', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pillows_own_limits_are_neither_used_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(saved(picture(), "PNG"), MediaLimits()).size == (32, 24)
    assert Image.MAX_IMAGE_PIXELS == 100
