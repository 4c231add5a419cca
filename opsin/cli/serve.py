"""`opsin serve`: the HTTP server, told by flags, environment variables or a YAML file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.config import variables
from opsin.errors import InputError
from opsin.server.settings import VARIABLES, Flag, flags, read_file, read_settings, variable


def serve(words: list[str] | None, config: str | None, given: dict[str, Any]) -> None:
    """Put the settings together and serve until a signal."""
    if words:
        if len(words) > 1 or given.get("model"):
            raise InputError(
                "More than one model is named",
                remedy="Name one, with --model or alone; requests may load others",
                param="model",
            )
        given["model"] = words[0]
    environment = variables((*VARIABLES, "OPSIN_CONFIG"))
    file = config or environment.get("OPSIN_CONFIG")
    settings = read_settings(given, environment, read_file(Path(file)) if file else {})
    from opsin.server.run import serve as run

    run(settings)


def _parameter(name: str, default: Any, flag: Flag) -> inspect.Parameter:
    """One flag of the command, read as text: settings are parsed alike wherever they come from."""
    dashed = name.replace("_", "-")
    spelling = f"--{dashed}/--no-{dashed}" if flag.kind == "switch" else f"--{dashed}"
    shown = "" if default in (None, (), False) else f" Default: {default}."
    option = typer.Option(
        spelling,
        *flag.names,
        help=f"{flag.help}{shown} ({variable(name)})",
        rich_help_panel=flag.panel,
        show_default=False,
    )
    types: dict[str, Any] = {"switch": bool | None, "list": list[str] | None}
    kind: Any = Annotated[types.get(flag.kind, str | None), option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _command() -> Callable[..., None]:
    """The command's function, with one parameter for each setting of the server's table."""

    def command(words: list[str] | None = None, config: str | None = None, **given: Any) -> None:
        serve(words, config, given)

    positional = Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")
    ]
    file = Annotated[
        str | None, typer.Option("--config", help="A YAML file of settings. (OPSIN_CONFIG)")
    ]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("words", kind, default=None, annotation=positional),
        inspect.Parameter("config", kind, default=None, annotation=file),
        *(_parameter(*each) for each in flags()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


command = _command()
