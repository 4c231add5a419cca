"""`opsin ocr`: pictures and PDF files to Markdown, JSON or HTML, many pages at once."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli.flags import (
    Device,
    Model,
    Quant,
    RepackedCache,
    Revision,
    json_option,
    load_with_progress,
)
from opsin.cli.ocr_sources import Source, find_sources, is_url, page_ranges, parse_pages
from opsin.errors import InputError, OpsinError

if TYPE_CHECKING:
    from opsin.cli.ocr_opening import Opening
    from opsin.cli.ocr_pages import DocumentText, PageStore, PageText
    from opsin.cli.ocr_reading import Reader
    from opsin.media.document import Document

OUTPUT = "Output"
READING = "Reading"
SUFFIXES = {".md": "md", ".markdown": "md", ".json": "json", ".html": "html", ".htm": "html"}
# What somebody who names a file of another kind than those would find a folder called.
_OTHER_ENDINGS = "txt text pdf doc docx odt rtf xml csv tsv jsonl tex"
OTHER_FILES = frozenset(f".{ending}" for ending in _OTHER_ENDINGS.split())
RECORDS = ".pages"


def command(
    files: Annotated[
        list[str], typer.Argument(help="Pictures, PDF files, folders, patterns or URLs.")
    ],
    model: Model = "bundled",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="A folder for the texts, or one file; without it they are printed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="md, json or html, or several with commas; md by default.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    furniture: Annotated[
        bool, typer.Option(help="Keep running heads and feet.", rich_help_panel=OUTPUT)
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Read pages again that were read before.", rich_help_panel=OUTPUT
        ),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            help="The model's own task: `opsin models tasks NAME` lists them.",
            rich_help_panel=READING,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-i", help="Ask this of every page.", rich_help_panel=READING),
    ] = None,
    dpi: Annotated[
        float,
        typer.Option(help="Dots per inch that PDF pages are drawn at.", rich_help_panel=READING),
    ] = 150.0,
    pages: Annotated[
        str | None,
        typer.Option(help="Only these pages of each file, such as 1-3,7.", rich_help_panel=READING),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of a page.", rich_help_panel=READING)
    ] = 4096,
    processor_kwargs: Annotated[
        str | None,
        typer.Option(help="The family's picture options, as JSON.", rich_help_panel=READING),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Pages at work at once.", rich_help_panel="Engine", min=1, max=256)
    ] = 8,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", rich_help_panel="Engine"),
    ] = None,
    quant: Quant = None,
    repacked_cache: RepackedCache = None,
    revision: Revision = None,
) -> None:
    """Read pictures and PDF files."""
    sources = find_sources(files)
    target = Target.of(out, output_format, sources)
    wanted = parse_pages(pages)
    from opsin.media.document import checked_dpi

    checked_dpi(dpi)
    options = {
        "max_tokens": max_tokens,
        "processor_kwargs": json_option("--processor-kwargs", processor_kwargs),
    }
    from opsin.cli.ocr_opening import Opening

    with Opening(target.surely_read(sources[0])) as opening:
        loaded, processor = load_with_progress(
            model,
            device=device,
            dtype=dtype,
            quantize=quant,
            repacked_cache=repacked_cache,
            revision=revision,
        )
        from opsin.cli.ocr_reading import Asking, Reader

        asking = Asking.of(processor, prompt, task, options)
        reader = Reader(loaded, processor, asking)
        settings = [model, revision, dtype, quant, asking.prompt, asking.task, options, dpi]
        run = Run(reader, target, model, settings, dpi, wanted, furniture=furniture, again=again)
        try:
            report = run.all(sources, concurrency, opening)
        except KeyboardInterrupt:
            run.report.print()
            if out is not None:
                typer.echo("opsin: stopped; the same command reads the rest", err=True)
            raise
    report.print()
    if report.errors:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where texts go: printed, into a folder, or into one file, whose name and ending are kept."""

    formats: tuple[str, ...]
    folder: Path | None = None
    name: str | None = None
    ending: str | None = None

    @classmethod
    def of(cls, out: Path | None, formats: str | None, sources: list[Source]) -> Target:
        """From the flags; InputError where they do not fit together."""
        suffix = SUFFIXES.get(out.suffix.lower()) if out is not None and not out.is_dir() else None
        given = tuple(name.strip() for name in (formats or suffix or "md").split(","))
        unknown = [name for name in given if name not in SUFFIXES.values()]
        if unknown:
            raise InputError(
                f"Unknown format {unknown[0]!r}", remedy="Use md, json or html", param="format"
            )
        if out is None:
            if len(given) > 1:
                raise InputError(
                    "Only one format can be printed",
                    remedy="Name a folder with --out",
                    param="format",
                )
            return cls(given)
        if suffix is None:
            if out.suffix.lower() in OTHER_FILES and not out.is_dir():
                raise InputError(
                    f"{out.name} is no kind of file that can be written",
                    remedy="Name a folder, or a file that ends in .md, .json or .html",
                    param="out",
                )
            if out.exists() and not out.is_dir():
                raise InputError(f"{out} is not a folder", param="out")
            return cls(given, out)
        if len(sources) > 1 or given != (suffix,):
            several = len(sources) > 1 or len(given) > 1
            raise InputError(
                f"{out.name} is one file",
                why="there are several texts to write" if several else f"it is not {given[0]}",
                remedy="Name a folder with --out",
                param="out",
            )
        return cls(given, out.parent, out.stem, out.suffix)

    def place(self, source: Source) -> Path:
        """The path of a document's text, without its ending."""
        assert self.folder is not None
        return self.folder / (self.name or source.place)

    def records(self, source: Source) -> Path | None:
        """The folder in which a document's pages are kept; None where texts are printed."""
        if self.folder is None:
            return None
        return self.folder / RECORDS / self.place(source).relative_to(self.folder)

    def surely_read(self, source: Source) -> Source | None:
        """The source if it is a file of which no page can have been read before, else None."""
        records = self.records(source)
        known = records is not None and records.exists()
        return None if known or is_url(source.path) else source


@dataclass(slots=True)
class Report:
    """What a run did. errors: (file, page, what went wrong); page 0 is the file as a whole."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    errors: list[tuple[str, int, str]] = field(default_factory=list)
    seconds: float = 0.0

    def print(self) -> None:
        """Errors and totals, on stderr; an error that many pages have is said once."""
        failed: dict[tuple[str, str], list[int]] = {}
        for path, number, said in sorted(self.errors):
            failed.setdefault((path, said), []).append(number)
        for (path, said), numbers in failed.items():
            several = "pages" if len(numbers) > 1 else "page"
            where = f"{path}, {several} {page_ranges(numbers)}" if numbers[0] else path
            typer.echo(f"opsin: {where}: {said}", err=True)
        rate = self.read / self.seconds if self.seconds else 0.0
        pages = "page" if self.read == 1 else "pages"
        parts = [f"{self.read} {pages} in {self.seconds:.1f} s, {rate:.2f} pages/s"]
        parts += [f"{self.kept} read before"] if self.kept else []
        parts += [f"{self.cut} cut off at --max-tokens"] if self.cut else []
        parts += [f"{len(self.errors)} failed"] if self.errors else []
        typer.echo("opsin: " + "; ".join(parts), err=True)


@dataclass(slots=True)
class Work:
    """One document while it is read."""

    source: Source
    store: PageStore | None
    numbers: list[int] | None = None  # None: not opened yet
    pages: dict[int, PageText] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    document: Document | None = None

    @property
    def is_done(self) -> bool:
        """Whether every page was read or has failed."""
        if self.numbers is None:
            return 0 in self.errors
        return len(self.pages) + len(self.errors) == len(self.numbers)


class Run:
    """One run of the command over its documents."""

    def __init__(
        self,
        reader: Reader,
        target: Target,
        model: str,
        settings: list[Any],
        dpi: float,
        wanted: frozenset[int] | None,
        *,
        furniture: bool = False,
        again: bool = False,
    ) -> None:
        self.reader = reader
        self.target = target
        self.model = model
        self.settings = settings
        self.dpi = dpi
        self.wanted = wanted
        self.furniture = furniture
        self.again = again
        self.report = Report()
        self.total = 0
        self._waiting: list[Work] = []  # documents whose text is to be printed, in order
        self._tick: Callable[[int, int], None] = lambda done, total: None

    def all(
        self, sources: list[Source], concurrency: int, opening: Opening | None = None
    ) -> Report:
        """Read every page of every document and write or print the texts.

        `opening` may hold the first document, open already.
        """
        from opsin.cli.ocr_opening import Opening
        from opsin.cli.windowed import windowed

        start = time.perf_counter()
        self.total = len(sources)
        works = [self._work(source) for source in sources]
        self._waiting = list(works)
        with progress() as self._tick:
            try:
                for done in windowed(
                    self._jobs(works, opening or Opening(None)), self._read, concurrency
                ):
                    work, number = done.job
                    if done.error is not None:
                        self._failed(work, number, done.error)
                    else:
                        self._keep(work, done.value)
                    self._finish(work)
            finally:
                self.reader.stop()
                for work in works:
                    if work.document is not None:
                        work.document.close()
                self.report.seconds = time.perf_counter() - start
        return self.report

    def _work(self, source: Source) -> Work:
        from opsin.cli.ocr_pages import PageStore

        folder = self.target.records(source)
        if folder is None:
            return Work(source, None)
        return Work(source, PageStore(folder, [*self.settings, *source.state]))

    def _jobs(self, works: list[Work], opening: Opening) -> Iterator[tuple[Work, int]]:
        """The pages that are to be read; a document is opened when its turn comes."""
        for work in works:
            count, known = (0, {}) if self.again or work.store is None else work.store.load()
            try:
                if count == 0 or not set(self._chosen(count)) <= set(known):
                    work.document = opening.take(work.source)
                    count = len(work.document)
                self._check_chosen(count)
            except OpsinError as error:
                self._failed(work, 0, error)
                self._finish(work)
                continue
            work.numbers = self._chosen(count)
            self.total += len(work.numbers) - 1
            work.pages = {n: known[n] for n in work.numbers if n in known}
            self.report.kept += len(work.pages)
            missing = [number for number in work.numbers if number not in work.pages]
            if not missing:
                self._finish(work)
            yield from ((work, number) for number in missing)

    def _check_chosen(self, count: int) -> None:
        if not self._chosen(count):
            raise InputError(
                "It has none of the pages asked for",
                why=f"it has {count}" if count > 1 else "it has one page",
                param="pages",
            )

    def _chosen(self, count: int) -> list[int]:
        return [n for n in range(1, count + 1) if self.wanted is None or n in self.wanted]

    def _read(self, job: tuple[Work, int]) -> PageText:
        work, number = job
        assert work.document is not None
        page, crops = self.reader.read(work.document, number, self.dpi)
        return page if work.store is None else self._stored(work, work.store, page, crops)

    def _stored(
        self, work: Work, store: PageStore, page: PageText, crops: list[tuple[int, Any]]
    ) -> PageText:
        """Write a page's pictures beside its text, and keep the page."""
        place = self.target.place(work.source)
        names = {}
        for number, (at, picture) in enumerate(crops, 1):
            name = f"{place.name}_files/page-{page.number}-{number}.png"
            path = place.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            names[at] = name
        page = dataclasses.replace(page, pictures=names)
        assert work.document is not None
        store.save(page, len(work.document))
        return page

    def _keep(self, work: Work, page: PageText) -> None:
        work.pages[page.number] = page
        self.report.read += 1
        self.report.cut += page.finish_reason == "length"

    def _failed(self, work: Work, number: int, error: OpsinError) -> None:
        work.errors[number] = error.line()
        self.report.errors.append((work.source.path, number, error.line()))

    def _finish(self, work: Work) -> None:
        """After a page: show it, and write the document's text once it is whole."""
        done = self.report.read + self.report.kept + len(self.report.errors)
        self._tick(done, self.total)
        if not work.is_done:
            return
        if work.document is not None:
            work.document.close()
            work.document = None
        if self.target.folder is not None:
            self._write(work)
            return
        while self._waiting and self._waiting[0].is_done:
            first = self._waiting.pop(0)
            if first.pages:
                sys.stdout.write(self._text(first).render(self.target.formats[0], self.furniture))
                sys.stdout.flush()

    def _text(self, work: Work) -> DocumentText:
        from opsin.cli.ocr_pages import DocumentText

        ordered = [work.pages[number] for number in sorted(work.pages)]
        return DocumentText(work.source.path, self.model, ordered, work.errors)

    def _write(self, work: Work) -> None:
        from opsin.cli.ocr_pages import write_whole

        if not work.pages:
            return
        text = self._text(work)
        place = self.target.place(work.source)
        for form in self.target.formats:
            name = f"{place.name}{self.target.ending or f'.{form}'}"
            write_whole(place.with_name(name), text.render(form, self.furniture))


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many pages of how many are done, on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich import progress as shown

    columns = (
        shown.TextColumn("Reading"),
        shown.BarColumn(),
        shown.MofNCompleteColumn(),
        shown.TextColumn("{task.fields[speed]}"),
        shown.TimeRemainingColumn(),
    )
    with shown.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("pages", total=None, speed="")
        start = time.perf_counter()

        def tick(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - start)
            bar.update(task, completed=done, total=total, speed=f"{rate:.2f} pages/s")

        yield tick
