"""`opsin transcribe`: the words of a sound, as text, JSON or subtitles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli.flags import Device, Model, Revision, load_with_progress
from opsin.errors import InputError

if TYPE_CHECKING:
    from opsin.media.pauses import Piece
    from opsin.prompt.transcription import Segment

FORMATS = ("text", "json", "verbose_json", "srt", "vtt")
ENDINGS = {".txt": "text", ".json": "json", ".srt": "srt", ".vtt": "vtt"}


def command(
    file: Annotated[str, typer.Argument(help="A sound, or a video with sound: file or URL.")],
    model: Model = "bundled",
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="text, json, verbose_json, srt or vtt; by OUT's ending, else text."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write to this file instead of printing.")
    ] = None,
    language: Annotated[
        str, typer.Option(help="The language spoken, such as en, if it is known.")
    ] = "",
    prompt: Annotated[
        str, typer.Option("--prompt", "-i", help="Names and words that may occur.")
    ] = "",
    chunk_seconds: Annotated[
        float | None,
        typer.Option(
            help="Longest piece heard at once; cut at pauses. 30, or 10 where times are written.",
            min=1.0,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a piece.")] = 1024,
    temperature: Annotated[
        float, typer.Option("--temperature", "--temp", help="0 is greedy.")
    ] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Pieces at work at once.", min=1, max=64)] = 4,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    revision: Revision = None,
) -> None:
    """Write down what a sound says, with a model that hears."""
    form = chosen_format(output_format, out)
    loaded, processor = load_with_progress(model, device=device, dtype=dtype, revision=revision)
    from opsin.api import generate
    from opsin.prompt import transcription

    transcription.check_hears(processor)
    timed = form in transcription.TIMED
    longest = chunk_seconds or (transcription.LONGEST_TIMED if timed else transcription.LONGEST)
    pieces = transcription.load_pieces(file, processor.limits, longest)
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}

    def hear(piece: Piece) -> str:
        messages, template = transcription.asking(processor, piece, language, prompt)
        return generate(loaded, processor, messages, **sampling, **template).text

    printing = out is None and form == "text"
    segments = []
    for segment in heard(pieces, hear, concurrency):
        segments.append(segment)
        if printing and segment.text.strip():
            sys.stdout.write(segment.text.strip() + "\n")
            sys.stdout.flush()
    if not printing:
        write(transcription.render(segments, form, language), out)


def chosen_format(given: str | None, out: Path | None) -> str:
    """The form that the flags ask for."""
    form = given or ENDINGS.get(out.suffix.lower() if out is not None else "", "text")
    if form not in FORMATS:
        raise InputError(
            f"Unknown format {form!r}", remedy=f"Use {', '.join(FORMATS)}", param="format"
        )
    return form


def heard(pieces: list[Piece], hear: Callable[[Piece], str], concurrency: int) -> Iterator[Segment]:
    """The words of every piece, in order, several pieces at work at once."""
    from opsin.cli.windowed import windowed
    from opsin.prompt.transcription import Segment

    waiting: dict[int, Segment] = {}
    place = 0
    with progress(len(pieces)) as tick:
        jobs = enumerate(pieces)
        for done in windowed(jobs, lambda job: hear(job[1]), concurrency):
            if done.error is not None:
                raise done.error
            number, piece = done.job
            waiting[number] = Segment(piece.start, piece.end, done.value)
            while place in waiting:
                tick(piece.end)
                yield waiting.pop(place)
                place += 1


def write(text: str, out: Path | None) -> None:
    """To the file, or to stdout."""
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written", why=error.strerror or "") from error


@contextmanager
def progress(pieces: int) -> Iterator[Callable[[float], Any]]:
    """A function that shows how far the transcript has come, on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or sys.stdout.isatty() or pieces < 2:
        yield lambda moment: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("Listening", total=pieces)
        yield lambda moment: bar.advance(task)
