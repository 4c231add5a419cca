"""`opsin ocr`: what is read, in which order, what is kept, and what failed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from PIL import Image

from opsin.api import GenerationResult, load
from opsin.cli.ocr import Report, Run, Target, command
from opsin.cli.ocr_opening import Opening
from opsin.cli.ocr_pages import DocumentText, PageStore, PageText, as_html
from opsin.cli.ocr_reading import Asking, Reader, Stopped, elements_of
from opsin.cli.ocr_sources import find_sources, parse_pages
from opsin.cli.windowed import windowed
from opsin.errors import InputError, MediaError, NotFoundError
from opsin.grounding.layout import Element, Layout
from opsin.grounding.regions import Box
from opsin.media.document import Document
from tests.media.papers import filled, pdf, scanned

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "tests" / "bundled" / "heldout"
PICTURES = [HELD_OUT / f"{name}.png" for name in ("paragraph_cer_0", "line_cer_0", "line_cer_1")]


def opsin(*words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "opsin", "ocr", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def whole_points(image: Image.Image) -> Image.Image:
    """The picture with white added until its sides are whole points at 150 dots per inch.

    PDF sizes are single-precision points: between them, a page is drawn resampled.
    """
    canvas = Image.new("RGB", (-(-image.width // 25) * 25, -(-image.height // 25) * 25), "white")
    canvas.paste(image)
    return canvas


def texts(path: Path) -> list[str]:
    return [page["text"] for page in json.loads(path.read_text(encoding="utf-8"))["pages"]]


def test_pages_of_a_pdf_read_as_the_same_pictures_do_and_once(tmp_path: Path) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    images = [whole_points(Image.open(path)) for path in PICTURES]
    (given / "scan.pdf").write_bytes(scanned(*images))
    for number, image in enumerate(images):
        image.save(given / f"{number}.png")
    (given / "torn.pdf").write_bytes(b"%PDF-1.7 torn")
    done = opsin(given, "-o", out, "--format", "json,md")
    assert done.returncode == 1
    assert "torn.pdf" in done.stderr
    assert "6 pages in" in done.stderr
    alone = [text for number in range(3) for text in texts(out / f"{number}.json")]
    assert texts(out / "scan.json") == alone
    assert "income No parcel" in alone[0]
    markdown = (out / "scan.md").read_text(encoding="utf-8")
    assert markdown.index("<!-- page 2 -->") < markdown.index(alone[1]) < markdown.index(alone[2])
    assert not (out / "torn.md").exists()
    (given / "torn.pdf").unlink()
    (out / ".pages" / "scan" / "00002.json").unlink()
    done = opsin(given, "-o", out, "--format", "json,md")
    assert done.returncode == 0, done.stderr
    assert "1 page in" in done.stderr
    assert "5 read before" in done.stderr
    assert texts(out / "scan.json") == alone


class Stub:
    """A reader that tells two parts of every page, fails where it is told to, and counts."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad
        self.read_pages: list[int] = []
        self.turn = {3: threading.Event(), 2: threading.Event()}

    def stop(self) -> None:
        pass

    def read(self, document: Any, number: int, dpi: float | None) -> Any:
        # Pages end in the order 3, 2, 1.
        if number + 1 in self.turn:
            self.turn[number + 1].wait(10)
        if number in self.turn:
            self.turn[number].set()
        self.read_pages.append(number)
        image = document.page(number, dpi)
        if number in self.bad:
            raise MediaError("This page is odd", remedy="Turn it")
        elements = (
            Element(Box(0, 0, 90, 20), "Page-header", "running head"),
            Element(Box(0, 0, 90, 20), "Title", f"Page {number}"),
            Element(Box(0, image.height / 2, image.width / 2, image.height), "Picture", "a square"),
            Element(Box(0, 0, 9, 9), "Table", "<table><tr><td>1</td></tr></table><script>x"),
        )
        page = PageText(number, image.size, "raw", elements, finish_reason="length")
        box = tuple(int(side) for side in elements[2].bbox.bounds)
        return page, [(2, image.crop(box))]


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdf([filled(1, 0, 0), filled(0, 1, 0), filled(0, 0, 1)]))
    return path


def run(reader: Stub, paper: Path, out: Path | None, form: str | None = None, **how: Any) -> Report:
    sources = find_sources([str(paper)])
    target = Target.of(out, form, sources)
    asked: Any = reader
    wanted = how.pop("wanted", None)
    return Run(asked, target, "stub", ["stub"], 72, wanted, **how).all(sources, 3)


def test_pictures_are_cut_out_and_tables_kept(paper: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(Stub(), paper, out, "md,html,json")
    assert (report.read, report.cut, report.errors) == (3, 3, [])
    markdown = (out / "paper.md").read_text(encoding="utf-8")
    assert markdown.startswith(
        "<!-- page 1 -->\n\n# Page 1\n\n![a square](paper_files/page-1-1.png)"
    )
    assert "<table><tr><td>1</td></tr></table>&lt;script&gt;" in markdown
    assert "running head" not in markdown
    for number, colour in ((1, (255, 0, 0)), (2, (0, 255, 0)), (3, (0, 0, 255))):
        cut = Image.open(out / "paper_files" / f"page-{number}-1.png")
        assert cut.size == (100, 50)
        assert cut.getextrema() == tuple((c, c) for c in colour)
    page = (out / "paper.html").read_text(encoding="utf-8")
    assert '<section id="page-2">\n<h1>Page 2</h1>' in page
    assert '<img src="paper_files/page-3-1.png" alt="a square">' in page
    assert "<script>" not in page
    held = json.loads((out / "paper.json").read_text(encoding="utf-8"))
    assert [page["page"] for page in held["pages"]] == [1, 2, 3]
    assert held["pages"][0]["elements"][2]["picture"] == "paper_files/page-1-1.png"


def test_failed_pages_are_reported_and_tried_again(paper: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(Stub(2), paper, out)
    assert report.errors == [(str(paper), 2, "This page is odd. Turn it.")]
    assert "<!-- page 2: This page is odd. Turn it. -->" in (out / "paper.md").read_text()
    second = Stub()
    second.turn = {}
    report = run(second, paper, out)
    assert (second.read_pages, report.kept, report.errors) == ([2], 2, [])
    assert "![a square](paper_files/page-1-1.png)" in (out / "paper.md").read_text()


def test_what_changes_the_text_is_read_again(paper: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(Stub(), paper, out).read == 3
    assert run(Stub(), paper, out).kept == 3
    assert run(Stub(), paper, out, again=True).read == 3
    paper.write_bytes(pdf([filled(1, 1, 1)] * 3))
    assert run(Stub(), paper, out).read == 3


def test_texts_are_printed_in_order(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Stub(), paper, None, furniture=True)
    shown = capsys.readouterr().out
    assert shown.index("# Page 1") < shown.index("# Page 2") < shown.index("# Page 3")
    assert "running head" in shown
    assert "](" not in shown


def test_some_pages_into_one_file(paper: Path, tmp_path: Path) -> None:
    reader = Stub()
    reader.turn = {}
    run(reader, paper, tmp_path / "text.html", wanted=parse_pages("3,1"))
    assert sorted(reader.read_pages) == [1, 3]
    page = (tmp_path / "text.html").read_text()
    assert page.index("page-1") < page.index("page-3")
    assert "page-2" not in page
    reader = Stub()
    reader.turn = {}
    run(reader, paper, tmp_path / "TEXT.Htm")
    assert "page-2" in (tmp_path / "TEXT.Htm").read_text()


def test_pages_that_a_document_lacks_are_an_error(paper: Path, tmp_path: Path) -> None:
    report = run(Stub(), paper, tmp_path / "out", wanted=parse_pages("9"))
    ((path, number, said),) = report.errors
    assert (path, number, report.read) == (str(paper), 0, 0)
    assert said == "It has none of the pages asked for: it has 3."
    kept = run(Stub(), paper, tmp_path / "out", wanted=parse_pages("3-9"))
    assert (kept.read, kept.errors) == (1, [])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--task", "nope"), "This model has no task 'nope'"),
        (("--max-tokens", "0"), "max_tokens cannot be 0"),
        (("--dpi", "0"), "dpi cannot be 0"),
    ],
)
def test_what_no_page_could_be_read_with_is_refused_once(
    paper: Path, flags: tuple[str, ...], says: str
) -> None:
    done = opsin(paper, *flags)
    assert done.returncode == 2
    assert done.stderr.count(says) == 1
    assert "page 1" not in done.stderr


def test_sources_are_found_and_told_apart(tmp_path: Path) -> None:
    for name in ("b.png", "a/x.pdf", "a/x.PNG", "a/notes.txt", "c/b.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    places = [str(source.place) for source in find_sources([str(tmp_path)])]
    assert places == ["a/x.PNG", "a/x.pdf", "b", "c/b"]
    found = find_sources([str(tmp_path / "*" / "[xb].*"), str(tmp_path / "b.png")])
    assert [str(source.place) for source in found] == ["x.PNG", "x.pdf", "b.png", "b.png-2"]
    (url,) = find_sources(["https://host/papers/1.pdf?key=1"])
    assert url.place == PurePosixPath("1")
    assert len(find_sources([str(tmp_path / "b.png")] * 2)) == 1
    with pytest.raises(NotFoundError, match=r"no file .*gone\.png"):
        find_sources([str(tmp_path / "gone.png")])


def test_an_answer_without_the_parts_it_should_tell_is_kept_as_text() -> None:
    parts = (Element(Box(0, 0, 1, 1), "Text", "a"),)
    assert elements_of(GenerationResult("a")) is None
    assert elements_of(GenerationResult("[...]", layout=Layout(parts))) == parts
    assert elements_of(GenerationResult("[]", layout=Layout())) == ()
    assert elements_of(GenerationResult("no JSON", layout=Layout())) is None


@pytest.mark.parametrize(
    ("text", "numbers"), [("1-3,7", {1, 2, 3, 7}), ("2", {2}), (" 4 , 5-6", {4, 5, 6})]
)
def test_page_ranges(text: str, numbers: set[int]) -> None:
    assert parse_pages(text) == numbers


def test_an_error_of_many_pages_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    same = [("b.pdf", number, "It is odd.") for number in (7, 1, 3, 2)]
    Report(errors=[*same, ("a.pdf", 0, "It is torn."), ("b.pdf", 4, "It is locked.")]).print()
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "opsin: a.pdf: It is torn.",
        "opsin: b.pdf, pages 1-3,7: It is odd.",
        "opsin: b.pdf, page 4: It is locked.",
    ]
    assert parse_pages("1-3,7") == {1, 2, 3, 7}
    assert said[3].endswith("6 failed")


def test_a_folder_without_pages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to read: no picture or PDF file is in "):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("text", ["", "0", "a", "1-", "-3", "1--2", "5-3"])
def test_no_page_range(text: str) -> None:
    with pytest.raises(InputError, match="names no pages"):
        parse_pages(text)


@pytest.mark.parametrize(
    ("out", "form", "says"),
    [
        (None, "md,json", "Only one format"),
        (None, "docx", "Unknown format 'docx'"),
        ("text.md", "json", "one file: it is not json"),
        ("text.md", "md,json", "one file: there are several texts"),
        ("text.txt", None, "text.txt is no kind of file that can be written"),
    ],
)
def test_targets_that_do_not_fit(paper: Path, out: str | None, form: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Target.of(Path(out) if out else None, form, find_sources([str(paper)]))


def test_html_of_plain_text_keeps_tables_and_no_scripts() -> None:
    text = "# Total\n\na\nb <script>x</script>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    page = as_html(text + '<table onclick="x"><tr><td colspan="2">3</td></tr></table> end')
    assert "<h1>Total</h1>" in page
    assert "a<br />\nb &lt;script&gt;" in page
    assert "<td>1</td>" in page
    assert '<table><tr><td colspan="2">3</td></tr></table>' in page


def test_a_record_that_cannot_be_read_is_no_page(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "x", ["a"])
    page = PageText(2, (3, 4), "text", (Element(Box(0, 0, 1, 1), "Picture", ""),), {0: "f.png"})
    store.save(page, 9)
    (tmp_path / "x" / "00003.json").write_text("{")
    (tmp_path / "x" / "00004.json").write_text("[]")
    total, pages = store.load()
    assert total == 9
    assert list(pages) == [2]
    assert pages[2].to_dict() == page.to_dict()
    assert PageStore(tmp_path / "x", ["b"]).load() == (0, {})


def test_a_comment_cannot_be_ended_by_an_error() -> None:
    text = DocumentText("a", "m", [], {1: "--> <script>"}).markdown()
    assert text == "<!-- page 1: - -> <script> -->\n"


def test_the_first_document_is_opened_beforehand_and_closed_if_nobody_takes_it(
    paper: Path, tmp_path: Path
) -> None:
    (source,) = find_sources([str(paper)])
    with Opening(source) as opening:
        held = opening.take(source)
        with opening.take(source) as another:
            assert another is not held, "it is given once"
    with held:
        assert len(held) == 3
        assert held.page(1).width > 0, "whoever took it closes it"
    with Opening(source) as opening:
        unread = opening._document
    assert unread is not None
    with pytest.raises(MediaError, match="closed"):
        unread.result().page(1)
    target = Target.of(tmp_path / "out", None, [source])
    assert target.surely_read(source) is source
    run(Stub(), paper, tmp_path / "out")
    assert target.surely_read(source) is None


def test_a_reader_that_is_stopped_ends_the_pages_at_work() -> None:
    model, processor = load("bundled")
    options = {"max_tokens": 1024, "ignore_eos": True}
    reader = Reader(model, processor, Asking.of(processor, None, None, options))
    with ThreadPoolExecutor(2) as pool:
        pages = [pool.submit(reader.read, Document(PICTURES[1]), 1, None) for _ in range(2)]
        while len(reader._at_work) < 2:
            assert not any(page.done() for page in pages)
        reader.stop()
        for page in pages:
            with pytest.raises(Stopped):
                page.result(60)
    with pytest.raises(Stopped):
        reader.read(Document(PICTURES[1]), 1, None)


def test_a_run_that_is_stopped_says_how_far_it_came(
    paper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(self: Reader, document: Document, number: int, dpi: float | None) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return PageText(number, document.page(number, dpi).size, "text"), []

    monkeypatch.setattr(Reader, "read", read)
    with pytest.raises(KeyboardInterrupt):
        command([str(paper)], out=tmp_path / "out", concurrency=1)
    said = capsys.readouterr().err
    assert "opsin: 1 page in" in said
    assert "opsin: stopped; the same command reads the rest" in said
    monkeypatch.undo()
    command([str(paper)], out=tmp_path / "out")
    assert "2 pages in" in (said := capsys.readouterr().err)
    assert "1 read before" in said


def test_the_window_bounds_what_is_at_work() -> None:
    drawn: list[int] = []
    ended: list[int] = []

    def jobs() -> Any:
        for number in range(6):
            assert number - len(ended) <= 2
            drawn.append(number)
            yield number

    for done in windowed(jobs(), lambda number: number * 2, 2):
        ended.append(done.job)
        assert done.value == done.job * 2
    assert sorted(ended) == drawn == [0, 1, 2, 3, 4, 5]


def test_a_bug_ends_the_run() -> None:
    def work(number: int) -> int:
        raise KeyError(number)

    with pytest.raises(KeyError):
        list(windowed(range(3), work, 2))
