"""The command line: parse, call, print, importing torch only once a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from opsin import __version__
from opsin.cli import bench_serve, chat, doctor, generate, models, ocr, serve, transcribe, ui

app = typer.Typer(
    name="opsin",
    help="Open vision-language models on one machine: pictures, video, sound, text in; text out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"opsin {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What every command shares."""
    del version


app.command("generate", help="Answer one prompt, with or without pictures.")(generate.command)
app.command("run", hidden=True)(generate.command)
app.command("ocr", help="Read pictures and PDF files: Markdown, JSON or HTML.")(ocr.command)
app.command("chat", help="Talk with a model in the terminal.")(chat.command)
app.command("transcribe", help="Write down what a sound says.")(transcribe.command)
app.command("ui", help="Show the chat page in a browser.")(ui.command)
app.add_typer(models.app, name="models")
app.command("doctor", help="Say what this machine offers, and what is missing.")(doctor.command)
app.command("serve", help="Serve models over HTTP: OpenAI's and Anthropic's protocols.")(
    serve.command
)
bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
bench.command("serve", help="Load any OpenAI server with requests and measure it.")(
    bench_serve.command
)
app.add_typer(bench, name="bench")
