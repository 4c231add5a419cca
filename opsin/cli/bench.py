"""`opsin bench`: measurements, each a command of its own."""

from __future__ import annotations

import typer

from opsin.cli import bench_serve

app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.command("serve", help="Load any OpenAI server with requests and measure it.")(
    bench_serve.command
)


@app.callback()
def bench() -> None:
    """What every measurement shares."""
