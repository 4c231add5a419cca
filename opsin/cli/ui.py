"""`opsin ui`: the chat page in a browser, over models in this process or a server."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import typer

from opsin.cli.flags import BUNDLED_NOTE, Device, Model
from opsin.errors import InputError, MissingDependency
from opsin.families.index import SUGGESTION


def command(
    model: Model = "bundled",
    base_url: Annotated[
        str | None,
        typer.Option(help="Answer through this OpenAI-compatible server: http://HOST:8080/v1"),
    ] = None,
    api_key: Annotated[str, typer.Option(help="The server's key.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="Port to listen on.")] = 7860,
    login: Annotated[
        str | None,
        typer.Option(metavar="NAME:PASSWORD", help="Who may use it; needed beyond this machine."),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", rich_help_panel="Engine"),
    ] = None,
) -> None:
    """Show the chat page."""
    known = check_login(host, login)
    try:
        import gradio
    except ImportError as error:
        raise MissingDependency(
            "The chat page cannot be shown",
            why="Gradio is not installed",
            remedy="pip install 'opsin[ui]'",
        ) from error
    from opsin.ui.backends import Local, Remote
    from opsin.ui.page import CSS, build, theme

    if base_url is None and model == "bundled":
        typer.echo(BUNDLED_NOTE.format(suggestion=SUGGESTION), err=True)
    local = Local(model, device=device, dtype=dtype)
    backend = local if base_url is None else Remote(base_url, api_key)
    page = build(backend, any_model=is_loopback(host))
    if base_url is None:
        backend.prepare(model)
    typer.echo(f"opsin: http://{host}:{port}", err=True)
    del gradio
    page.launch(
        server_name=host,
        server_port=port,
        auth=known,
        share=False,
        inbrowser=open_browser,
        quiet=True,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        theme=theme(),
        css=CSS,
        max_file_size="128mb",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_login(host: str, login: str | None) -> tuple[str, str] | None:
    """Name and password; InputError where an address needs them and there are none."""
    if login is None:
        if is_loopback(host):
            return None
        raise InputError(
            f"{host} can be reached from other machines",
            why="anyone there could use the page",
            remedy="Give --login NAME:PASSWORD, or leave --host out",
            param="login",
        )
    name, colon, password = login.partition(":")
    if not (name and colon and password):
        raise InputError("--login is not NAME:PASSWORD", param="login")
    return name, password
