"""Pictures that are damaged, lie or are something else: one clear error each, in bounded time."""

import re
import sys
import threading
import zlib

import pytest
from PIL import Image, ImageFile

from opsin.errors import MediaError, MediaTimeout, MediaTooLarge, UnsupportedMedia
from opsin.media import image as image_module
from opsin.media.image import load_image
from opsin.media.limits import FLAGS, Deadline, MediaLimits
from opsin.media.worker import Workers
from tests.media.samples import picture, refusal_line, saved
from tests.media.test_image import FORMATS, png_chunk, raw_png

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
REPR = r"<\w+|\b0x[0-9a-f]{4,}"


def bomb(name, width=30_000, height=30_000):
    """A picture file of a few bytes whose header states that size."""
    if name == "PNG":
        return raw_png(width, height, 8, 2, b"")
    sides = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    if name == "GIF":
        return b"GIF89a" + sides + b"\0\0\0,\0\0\0\0" + sides + b"\0\x02\0;"
    if name == "BMP":
        return (
            saved(picture(), "BMP")[:18]
            + width.to_bytes(4, "little") * 2
            + b"\1\0\x18\0"
            + bytes(40)
        )
    if name == "PPM":
        return b"P6 %d %d 255\n" % (width, height)
    if name == "TIFF":
        data = saved(Image.new("L", (3, 2)), "TIFF")
        entries = [b"\x00\x01\x04\x00\x01\x00\x00\x00", b"\x01\x01\x04\x00\x01\x00\x00\x00"]
        for entry in entries:
            at = data.index(entry) + 8
            data = data[:at] + width.to_bytes(4, "little") + data[at + 4 :]
        return data
    data = saved(picture(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "PPM", "TIFF", "JPEG"])
def test_row_08_a_bomb_is_refused_by_its_header(name, monkeypatch):
    data = bomb(name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("pixels were decoded"))
    with pytest.raises(MediaTooLarge) as caught:
        load_image(data)
    for words in ("30000x30000", "900,000,000", "67,108,864", "--max-image-pixels"):
        assert words in caught.value.line()
    assert caught.value.status == 413


def test_row_08_pil_images_and_arrays_have_the_same_budget():
    limits = MediaLimits(max_pixels=100)
    small = picture(10, 10)
    assert load_image(small, limits).size == (10, 10)
    import numpy as np

    for source in (picture(11, 10), np.zeros((11, 10), np.uint8), np.zeros((11, 10, 3), np.uint8)):
        with pytest.raises(MediaTooLarge, match="--max-image-pixels"):
            load_image(source, limits)


def test_row_08_bytes_are_counted_before_decoding(tmp_path):
    data = saved(picture(), "BMP")
    path = tmp_path / "a.bmp"
    path.write_bytes(data)
    limits = MediaLimits(max_bytes=len(data) - 1)
    for source in (data, path, "data:image/bmp;base64," + "A" * 4000, "data:," + "%41" * 3000):
        with pytest.raises(MediaTooLarge, match="--max-media-bytes"):
            load_image(source, limits)


def test_row_08_a_gif_frame_may_not_outgrow_its_screen_past_the_budget():
    small = (4).to_bytes(2, "little") * 2
    large = (20_000).to_bytes(2, "little") * 2
    data = b"GIF89a" + small + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    data += b",\0\0\0\0" + large + b"\0\x02\x02\x4c\x01\0;"
    with pytest.raises(MediaError):
        load_image(data)


@pytest.mark.parametrize("name", FORMATS)
def test_row_23_every_cut_of_a_file_is_an_error_or_a_picture(name):
    data = saved(picture(40, 30), name)
    cuts = {0, 1, 4, 16, 40, len(data) - 1, *range(2, len(data), max(1, len(data) // 40))}
    for cut in sorted(cuts):
        line = refusal_line(load_image, data[:cut])
        assert not re.search(REPR, line)
        assert line or load_image(data[:cut]).size == (40, 30)


@pytest.mark.parametrize("name", FORMATS)
def test_row_23_flipped_bytes_never_escape_as_another_exception(name):
    data = bytearray(saved(picture(40, 30), name))
    for at in range(0, len(data), max(1, len(data) // 60)):
        data[at] ^= 0xFF
        assert not re.search(REPR, refusal_line(load_image, bytes(data)))
        data[at] ^= 0xFF


def test_a_truncated_photograph_is_refused_not_half_grey():
    data = saved(Image.effect_noise((200, 200), 90).convert("RGB"), "JPEG")
    for half in (data[: len(data) // 2], data[: len(data) // 10]):
        with pytest.raises(MediaError, match="damaged or incomplete"):
            load_image(half)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", MediaError, "0 bytes"),
        (b"hello, I am text\n" * 50, UnsupportedMedia, "it is text"),
        (b"<!DOCTYPE html><html>", UnsupportedMedia, "web page"),
        (b'<?xml version="1.0"?><svg xmlns="x">', UnsupportedMedia, "SVG.*Convert it to PNG"),
        (b"%PDF-1.7\n", UnsupportedMedia, "PDF.*opsin ocr"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", UnsupportedMedia, "Pass it as a video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", UnsupportedMedia, "install pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", UnsupportedMedia, "PostScript"),
        (b"RIFF\0\0\0\0WAVEfmt ", UnsupportedMedia, "WAV or AVI"),
        (bytes(range(256)), UnsupportedMedia, "no known picture format"),
        (b"\xff\xd8\xff", MediaError, "damaged or incomplete"),
    ],
)
def test_what_is_no_picture_is_named_with_a_remedy(data, error, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(error, match=words) as caught:
        load_image(path)
    assert "a.png" in caught.value.line()
    with pytest.raises(error, match=words):
        load_image(data)


def test_row_09_no_error_shows_an_object_or_an_address():
    for data in (
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        saved(picture(), "TIFF")[:40],
        b"BM" + bytes(60),
    ):
        with pytest.raises(MediaError) as caught:
            load_image(data)
        assert not re.search(REPR, caught.value.line())


def test_text_chunks_that_unpack_to_much_do_not():
    packed = b"Comment\0\0" + zlib.compress(bytes(50_000_000))
    data = raw_png(1, 1, 8, 0, b"\0\0", png_chunk(b"zTXt", packed))
    with pytest.raises(MediaError):
        load_image(data)


def test_row_23_a_decoder_that_hangs_is_left_behind(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(image_module, "to_rgb", lambda image: release.wait(30))
    try:
        with pytest.raises(MediaTimeout, match=r"0\.05 seconds.*--media-timeout"):
            load_image(saved(picture(), "PNG"), MediaLimits(deadline=0.05))
    finally:
        release.set()


def test_row_23_workers_left_behind_are_few_and_counted():
    release = threading.Event()
    workers = Workers(max_left_behind=2)
    for _ in range(2):
        with pytest.raises(MediaTimeout):
            workers.run(release.wait, Deadline(0.01), "x")
    with pytest.raises(MediaTimeout, match="2 earlier media items"):
        workers.run(lambda: 1, Deadline(5), "x")
    release.set()
    while workers.left_behind():
        pass
    assert workers.run(lambda: 1, Deadline(5), "x") == 1


def test_a_workers_exception_reaches_the_caller_as_it_is():
    def fail():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Workers().run(fail, Deadline(5), "x")


def test_limits_must_be_positive_and_each_has_a_flag():
    for name in ("max_bytes", "max_pixels", "max_frames", "deadline"):
        with pytest.raises(Exception, match=FLAGS[name]):
            MediaLimits(**{name: 0})
    assert set(FLAGS) == set(MediaLimits.__dataclass_fields__)
