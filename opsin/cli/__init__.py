"""The command line: parse, call, print, importing a command only once it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from opsin import __version__


class Listed(NamedTuple):
    """A command as the list shows it. module: where its `command` is, or `app` of several."""

    module: str
    about: str
    hidden: bool = False
    several: bool = False


COMMANDS = {
    "generate": Listed("generate", "Answer one prompt, with or without pictures."),
    "run": Listed("generate", "Answer one prompt, with or without pictures.", hidden=True),
    "ocr": Listed("ocr", "Read pictures and PDF files: Markdown, JSON or HTML."),
    "chat": Listed("chat", "Talk with a model in the terminal."),
    "transcribe": Listed("transcribe", "Write down what a sound says."),
    "quantize": Listed("quantize", "Write a checkpoint with quantised weights, or without."),
    "convert": Listed(
        "quantize", "Write a checkpoint with quantised weights, or without.", hidden=True
    ),
    "ui": Listed("ui", "Show the chat page in a browser."),
    "models": Listed(
        "models", "List families and cached models; inspect a checkpoint.", several=True
    ),
    "doctor": Listed("doctor", "Say what this machine offers, and what is missing."),
    "serve": Listed("serve", "Serve models over HTTP: OpenAI's and Anthropic's protocols."),
    "bench": Listed("bench", "Measure speed.", several=True),
}


class Commands(TyperGroup):
    """Knows the commands by name; a command's module is imported when that command is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name, and the words left for it."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, None if listed is None else made(str(listed.name)), rest


def made(name: str) -> Any:
    """The command of that name, whole, with its flags."""
    listed = COMMANDS[name]
    module = import_module(f"opsin.cli.{listed.module}")
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    if listed.several:
        single.add_typer(module.app, name=name, help=listed.about)
        return typer.main.get_group(single).commands[name]
    single.command(name, help=listed.about)(module.command)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=Commands,
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


for _name, _listed in COMMANDS.items():
    # In the list only: `Commands` puts the command itself in its place.
    app.command(_name, help=_listed.about, hidden=_listed.hidden)(lambda: None)
