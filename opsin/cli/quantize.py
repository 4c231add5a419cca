"""`opsin quantize`: a checkpoint folder with quantised weights, or with its weights whole again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opsin.cli.flags import Revision, byte_progress
from opsin.quant.recipes import BITS, GROUPS, RECIPES


def command(
    model: Annotated[str, typer.Option("--model", "-m", help="A hub name or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a new one.")],
    bits: Annotated[
        int, typer.Option(help=f"Bits of a weight: {', '.join(map(str, BITS))}.", metavar="BITS")
    ] = 4,
    group_size: Annotated[
        int,
        typer.Option(help=f"Columns that share a scale: {', '.join(map(str, GROUPS))}."),
    ] = 64,
    recipe: Annotated[
        str, typer.Option(help=f"{', '.join(RECIPES)}; mixed ones say the bits.", metavar="NAME")
    ] = "uniform",
    layout: Annotated[
        str,
        typer.Option(
            help="mlx: names and axes that mlx-vlm reads too; hf: those of the source.",
            metavar="NAME",
        ),
    ] = "mlx",
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Write a quantised checkpoint's weights as bfloat16."),
    ] = False,
    skip_vision: Annotated[
        bool,
        typer.Option("--skip-vision", help="Leave encoders as they are, instead of 8 bits."),
    ] = False,
    revision: Revision = None,
) -> None:
    """Write a checkpoint folder anew, quantised or dequantised, a few rows in memory at a time."""
    from opsin.api_quantize import quantize

    with byte_progress("Writing") as tick:
        written = quantize(
            model,
            out,
            bits,
            group_size,
            recipe,
            layout=layout,
            skip_vision=skip_vision,
            dequantize=dequantize,
            revision=revision,
            on_progress=tick,
        )
    before, after = (size(n) for n in (written.source_bytes, written.num_bytes))
    typer.echo(f"{before} before, {after} after: {written.folder}")


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
