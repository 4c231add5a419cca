"""PDF pages as pictures: what they show, in which order, and how hostile files end."""

import os
import signal
import threading
import time

import pytest

from opsin.errors import InputError, MediaError, MediaTimeout, MediaTooLarge, UnsupportedMedia
from opsin.media.document import Document, is_pdf, load_pages
from opsin.media.limits import MediaLimits
from opsin.media.loading import load
from opsin.types import Media

from .papers import filled, locked, pdf, plain, scanned
from .samples import picture, saved

THREE = pdf([filled(1, 0, 0), filled(0, 1, 0), filled(0, 0, 1)])


def test_pages_come_in_order_upright_and_on_white():
    pages = load_pages(THREE, dpi=72)
    assert [page.number for page in pages] == [1, 2, 3]
    assert [page.image.size for page in pages] == [(200, 100)] * 3
    assert [page.image.getpixel((20, 80)) for page in pages] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    assert all(page.image.getpixel((150, 20)) == (255, 255, 255) for page in pages)


@pytest.mark.parametrize(("dpi", "size"), [(72, (200, 100)), (144, (400, 200)), (36, (100, 50))])
def test_dpi_decides_the_size(dpi, size):
    assert load_pages(THREE, dpi=dpi, pages=[2])[0].image.size == size


def test_a_turned_page_is_upright():
    (page,) = load_pages(pdf([filled(1, 0, 0)], rotate=90), dpi=72)
    assert page.image.size == (100, 200)
    assert page.image.getpixel((20, 20)) == (255, 0, 0)


def test_a_scanned_page_keeps_its_pixels():
    shown = picture(310, 203)
    (page,) = load_pages(scanned(shown, dpi=150), dpi=150)
    assert page.image.size == shown.size
    assert page.image.tobytes() == shown.tobytes()


def test_one_page_at_a_time_from_threads():
    seen = {}
    with Document(THREE) as document:
        assert len(document) == 3

        def draw(number):
            seen[number] = document.page(number, 72).getpixel((20, 80))

        threads = [threading.Thread(target=draw, args=(number,)) for number in (3, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}


def test_a_file_a_picture_and_a_part(tmp_path):
    path = tmp_path / "scan.pdf"
    path.write_bytes(b"some mail header\n" + THREE)
    loaded = load(Media("document", path, {"dpi": 72, "pages": [3, 1]}))
    assert [page.number for page in loaded.value] == [3, 1]
    (page,) = load_pages(saved(picture(), "PNG"))
    assert (page.number, page.image.size) == (1, (32, 24))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.PDF", True),
        ("https://host/a.pdf?x=1", True),
        ("data:application/pdf;base64,JVBE", True),
        (THREE, True),
        ("a.png", False),
        ("data:image/png;base64,AAAA", False),
        (b"\x89PNG", False),
        (7, False),
    ],
)
def test_what_looks_like_a_pdf(source, expected):
    assert is_pdf(source) is expected


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"%PDF-1.7 and then nothing", MediaError, "damaged or incomplete"),
        (THREE[:200], MediaError, "damaged or incomplete"),
        (b"%PDF-" + bytes(5000), MediaError, "damaged or incomplete"),
        (b"", MediaError, "0 bytes"),
        (b"just text", UnsupportedMedia, "neither a PDF nor a picture: it is text"),
    ],
)
def test_damaged_files_are_one_line(data, kind, says):
    with pytest.raises(kind, match=says) as caught:
        load_pages(data, dpi=72)
    assert "\n" not in caught.value.line()


def test_a_page_without_a_size_gets_one():
    (page,) = load_pages(pdf([filled(1, 0, 0)], [(0, 0)]), dpi=72)
    assert page.image.width * page.image.height


def test_a_locked_document_says_so():
    with pytest.raises(MediaError, match="locked with a password"):
        load_pages(locked())


def test_pixels_are_counted_before_a_page_is_drawn():
    wide = pdf([filled(1, 0, 0)], [(14000, 14000)])
    start = time.perf_counter()
    with pytest.raises(MediaTooLarge, match=r"max_pixels.*--max-image-pixels"):
        load_pages(wide, dpi=600)
    assert time.perf_counter() - start < 10


def test_pages_bytes_and_all_pixels_have_limits():
    with pytest.raises(MediaTooLarge, match=r"3 pages, the limit is 2 pages.*--max-pages"):
        load_pages(THREE, MediaLimits(max_pages=2))
    assert len(load_pages(THREE, MediaLimits(max_pages=2), pages=[1, 3], dpi=20)) == 2
    with pytest.raises(MediaTooLarge, match="max_bytes"):
        load_pages(THREE, MediaLimits(max_bytes=100))
    with pytest.raises(MediaTooLarge, match="pixels on its pages"):
        load_pages(THREE, MediaLimits(max_video_pixels=30_000), dpi=72)
    with pytest.raises(InputError, match="no page 4"):
        load_pages(THREE, pages=[4])
    with pytest.raises(InputError, match="dpi cannot be 0"):
        load_pages(THREE, dpi=0)


def test_a_hanging_page_ends_at_the_deadline_and_the_next_is_drawn():
    with Document(THREE) as document:
        os.kill(document._process._process.pid, signal.SIGSTOP)
        patient, document.limits = document.limits, MediaLimits(deadline=0.3)
        with pytest.raises(MediaTimeout, match="page 1"):
            document.page(1)
        document.limits = patient
        assert document.page(2, 72).getpixel((20, 80)) == (0, 255, 0)


def test_a_process_that_dies_costs_one_page():
    with Document(THREE) as document:
        document._process.kill()
        document._process._process.wait()
        with pytest.raises(MediaError, match="ended the process"):
            document.page(1)
        assert document.page(1, 72).size == (200, 100)


def test_nothing_of_a_document_is_left_behind():
    document = Document(THREE)
    process = document._process
    document.close()
    assert not process.alive
    with pytest.raises(MediaError, match="closed"):
        document.page(1)


def test_many_pages_of_a_picture_take_one_process():
    data = scanned(*(plain((9 * i, 0, 0)) for i in range(12)), dpi=72)
    with Document(data) as document:
        process = document._process
        reds = [document.page(number, 72).getpixel((5, 5))[0] for number in range(1, 13)]
        assert document._process is process
    assert reds == [9 * i for i in range(12)]
