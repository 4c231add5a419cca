"""Flags that several commands share, and loading a model with a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from opsin.errors import InputError
from opsin.families.index import SUGGESTION

if TYPE_CHECKING:
    from opsin.engine.model import Model as LoadedModel
    from opsin.engine.processor import Processor

ENGINE = "Engine"
SAMPLING = "Sampling"

Model: TypeAlias = Annotated[
    str, typer.Option("--model", "-m", help="A hub name or a folder.", rich_help_panel=ENGINE)
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:N or mps; the best by default.", rich_help_panel=ENGINE),
]
Quant: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--quant",
        "--isq",
        help="Quantise to 8 or 4 bits while loading.",
        metavar="BITS",
        rich_help_panel=ENGINE,
    ),
]
Revision: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub name.", rich_help_panel=ENGINE),
]
MatFormerConfig: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--matformer-config",
        help="A CSV file of slices; the table that comes with the family by default.",
        rich_help_panel=ENGINE,
    ),
]
MatFormerSlice: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--matformer-slice",
        help="Load a smaller model within a nested one, by its name in the table.",
        rich_help_panel=ENGINE,
    ),
]
ChatTemplate: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        "-c",
        "--jinja-explicit",
        help="A jinja file, JSON holding one, or a bundled template's name.",
        rich_help_panel="Prompt",
    ),
]

Temperature: TypeAlias = Annotated[
    float, typer.Option("--temperature", "--temp", help="0 is greedy.", rich_help_panel=SAMPLING)
]
TopP: TypeAlias = Annotated[
    float, typer.Option(help="Nucleus mass; 1 is off.", rich_help_panel=SAMPLING)
]
TopK: TypeAlias = Annotated[
    int, typer.Option(help="Keep the k likeliest; 0 is off.", rich_help_panel=SAMPLING)
]
MinP: TypeAlias = Annotated[
    float, typer.Option(help="Keep those this likely beside the best.", rich_help_panel=SAMPLING)
]
RepetitionPenalty: TypeAlias = Annotated[
    float, typer.Option(help="1 is off.", rich_help_panel=SAMPLING)
]

FPS: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--fps",
        help="Frames to look at of each second of a video; the family's habit by default.",
        rich_help_panel="Media",
    ),
]
MaxFrames: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--max-frames",
        help="Most frames of a video, spread evenly; 8 where a model sees them as pictures.",
        rich_help_panel="Media",
    ),
]
UseAudioInVideo: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--use-audio-in-video", help="Let it hear the sound of videos.", rich_help_panel="Media"
    ),
]

KVBits: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--kv-bits", help="Bits of cached keys and values: 16, 8 or 4.", rich_help_panel=ENGINE
    ),
]
KVGroupSize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--kv-group-size",
        help="Cached values that share a scale below 16 bits: 32, 64 or 128.",
        rich_help_panel=ENGINE,
    ),
]
QuantizedKVStart: TypeAlias = Annotated[
    int,
    typer.Option(
        "--quantized-kv-start",
        help="Tokens that stay at 16 bits, up to the next whole block.",
        rich_help_panel=ENGINE,
    ),
]
MaxKVSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--max-kv-size",
        help="Tokens that the next one sees: the first 4 and the last ones; all by default.",
        rich_help_panel=ENGINE,
    ),
]
Speculative: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--speculative",
        help="ngram: guess from what was said before; the same answers, sooner where they repeat.",
        metavar="KIND",
        rich_help_panel=ENGINE,
    ),
]
RepackedCache: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--repacked-cache",
        help="Keep packed weights as the CPU reads them: auto, on, off or a folder.",
        metavar="WHERE",
        rich_help_panel=ENGINE,
    ),
]

BUNDLED_NOTE = "opsin: using the small bundled model; for real work name one: --model {suggestion}"


def json_option(flag: str, text: str | None) -> dict[str, Any] | None:
    """The JSON object that a flag was given, None if it was not."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag} is not valid JSON", why=str(error), param=flag) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{flag} is not a JSON object", remedy="Write it like '{\"name\": value}'", param=flag
        )
    return value


def load_with_progress(name: str, **options: Any) -> tuple[LoadedModel, Processor]:
    """`opsin.load`, with a bar on a terminal and a note on stderr when it is the bundled model."""
    from opsin.api import load

    if name == "bundled":
        typer.echo(BUNDLED_NOTE.format(suggestion=SUGGESTION), err=True)
    with byte_progress("Loading") as tick:
        return load(name, on_progress=tick, **options)


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """What shows on stderr how many bytes of how many are done; None off a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(binary_units=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("weights", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield on_progress


def note_window(max_kv_size: int | None) -> None:
    """Say on stderr what a window forgets."""
    if max_kv_size is not None:
        typer.echo(
            f"opsin: of more than {max_kv_size} tokens only the first 4 and the last "
            f"{max_kv_size - 4} are seen",
            err=True,
        )
