"""`opsin models`: which families there are, what is cached, and what a checkpoint needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opsin.cli.flags import Quant, Revision
from opsin.errors import InputError, UnknownFamily
from opsin.types import Task

app = typer.Typer(
    help="List families and cached models; inspect a checkpoint.", invoke_without_command=True
)


@app.callback()
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the families as a Markdown table.")
    ] = False,
) -> None:
    """List the supported families and the models in the local cache."""
    if context.invoked_subcommand is not None:
        return
    from opsin.checkpoint.hub import cached_models
    from opsin.checkpoint.repacked import kept_files
    from opsin.config import repacked_folder, settings

    table = family_table()
    if markdown:
        typer.echo(markdown_table(table), nl=False)
        return
    cached: list[dict[str, Any]] = [
        {"name": m.name, "model_type": m.model_type, "bytes": m.size} for m in cached_models()
    ]
    repacked: list[dict[str, Any]] = [
        {
            "made_from": file.source,
            "as": file.recipe,
            "bytes": file.num_bytes,
            "path": str(file.path),
        }
        for file in kept_files(repacked_folder() or settings().cache / "repacked")
    ]
    if as_json:
        typer.echo(json.dumps({"families": table, "cached": cached, "repacked": repacked}))
        return
    typer.echo("Families (model_type: what they take)")
    for row in table:
        typer.echo(f"  {row['model_type']:<24}{', '.join(row['takes'])}")
    typer.echo("\nIn the local cache")
    for entry in cached:
        typer.echo(f"  {entry['name']:<48}{entry['model_type']:<20}{entry['bytes'] / 1e9:.2f} GB")
    if not cached:
        typer.echo("  nothing yet; `opsin generate --model NAME` downloads what it needs")
    if repacked:
        total = sum(entry["bytes"] for entry in repacked) / 1e9
        typer.echo(f"\nKept by --repacked-cache ({total:.2f} GB; delete a file to free its space)")
    for entry in repacked:
        typer.echo(f"  {entry['path']}  {entry['bytes'] / 1e9:.2f} GB")


def family_table() -> list[dict[str, Any]]:
    """Every model_type with what it takes and the aliases it also answers to."""
    from opsin import families
    from opsin.families.index import ALIASES, MODULES

    rows = []
    for model_type in sorted(MODULES):
        aliases = sorted(alias for alias, name in ALIASES.items() if name == model_type)
        takes = ["text", *families.find(model_type).modalities]
        rows.append({"model_type": model_type, "aliases": aliases, "takes": takes})
    return rows


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The families as the table that the README shows."""
    lines = ["| `model_type` | also | takes |", "|---|---|---|"]
    for row in rows:
        aliases = ", ".join(f"`{alias}`" for alias in row["aliases"])
        lines.append(f"| `{row['model_type']}` | {aliases} | {', '.join(row['takes'])} |")
    return "\n".join(lines) + "\n"


@app.command("inspect")
def inspect(
    name: Annotated[str, typer.Argument(help="A hub name, a folder, or bundled.")],
    revision: Revision = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="Count the tokens of a picture of WIDTHxHEIGHT. Repeatable."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of context to plan memory for.")] = 8192,
    quant: Quant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is and what running it takes, without loading its weights."""
    facts = inspection(name, revision, image_size or ["1024x768"], context, quant)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    memory = facts["memory_bytes"]
    typer.echo(f"{name}: {facts['model_type']}, takes {', '.join(facts['takes'])}")
    typer.echo(f"  parameters       {facts['parameters'] / 1e6:,.1f} million ({facts['dtype']})")
    typer.echo(f"  longest context  {facts['max_positions']:,} tokens")
    kept = ", ".join(f"{n / 1e6:,.1f} million {kind}" for kind, n in facts["kept_as"].items())
    typer.echo(f"  weights          {memory['weights'] / 1e9:.2f} GB ({kept})")
    if memory["cache"] is not None:
        typer.echo(
            f"  cache            {memory['cache'] / 1e9:.2f} GB for {context:,} tokens"
            f" ({memory['cache_per_token'] / 1e3:.1f} kB each)"
        )
    for bits, size in memory["cache_at_kv_bits"].items():
        typer.echo(f"{'':<19}{size / 1e9:.2f} GB with --kv-bits {bits} --quantized-kv-start 0")
    typer.echo(f"  on a CPU         {facts['cpu']}")
    for size, tokens in facts["image_tokens"].items():
        typer.echo(f"  a picture        {size} costs {tokens} tokens")


@app.command("tasks")
def tasks(
    name: Annotated[str, typer.Argument(help="A hub name, a folder, bundled, or a model_type.")],
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what a model was trained to do, with the prompts that ask for it."""
    rows = [
        {"task": task, "about": known.about, "prompt": known.prompt, "layout": known.layout}
        for task, known in tasks_of(name, revision).items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    wide = max(16, *(len(str(row["task"])) + 2 for row in rows), 0)
    for row in rows:
        typer.echo(f"  {row['task']:<{wide}}{row['about']}\n  {'':<{wide}}{row['prompt']!r}")
    if not rows:
        typer.echo("  no tasks of its own: ask in the prompt")


def tasks_of(name: str, revision: str | None) -> Mapping[str, Task]:
    """The tasks of a checkpoint, or of all checkpoints of a model_type."""
    from opsin import families
    from opsin.checkpoint import hub
    from opsin.checkpoint.config import read_config, read_processor_config

    if name in families.model_types():
        return families.find(name).tasks
    folder = hub.resolve(name, revision=revision)
    return families.load(read_config(folder), read_processor_config(folder)).tasks


def inspection(
    name: str, revision: str | None, sizes: list[str], context: int, quant: int | None = None
) -> dict[str, Any]:
    """The facts that `inspect` prints."""
    from PIL import Image

    from opsin.checkpoint import hub
    from opsin.decoder.cache import CacheFormat, PagedCache
    from opsin.decoder.native import why_not
    from opsin.engine.model import build, pick_dtype, pick_formats, stored_weights
    from opsin.engine.packing import summary

    folder = hub.resolve(name, revision=revision)
    try:
        model = build(folder)
    except UnknownFamily as unknown:
        return borrowed_inspection(folder, unknown)
    tensors = stored_weights(folder, model.config, model.family)
    dtype = pick_dtype(None, model.config, tensors)
    per_token = PagedCache.bytes_per_token(model.decoder.config, dtype)
    reason = why_not(model.decoder.config)
    kept = summary(model, pick_formats(model, tensors, quant), dtype)
    forms = {bits: CacheFormat(bits) for bits in (8, 4)}
    smaller = {
        str(bits): context * PagedCache.bytes_per_token(model.decoder.config, dtype, form)
        for bits, form in forms.items()
        if not form.why_not(model.decoder.config)
    }
    tokens = {}
    if "image" in model.family.modalities:
        for size in sizes:
            picture = Image.new("RGB", parse_size(size))
            tokens[size] = model.family.prepare_image(picture, {}).num_tokens
    return {
        "model_type": model.config.model_type,
        "takes": ["text", *model.family.modalities],
        "parameters": model.num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "kept_as": kept.parameters,
        "max_positions": model.decoder.config.max_positions,
        "image_tokens": tokens,
        "cpu": f"layer by layer in torch: {reason}"
        if reason
        else "one native call a step (bfloat16)",
        "memory_bytes": {
            "weights": kept.num_bytes,
            "on_disk": sum(t.num_bytes for t in tensors),
            "cache_per_token": per_token,
            "cache": per_token * context,
            "cache_at_kv_bits": smaller,
        },
    }


def borrowed_inspection(folder: Path, unknown: UnknownFamily) -> dict[str, Any]:
    """The same facts of a model that runs through its Transformers class, as far as it has them."""
    from opsin.checkpoint import weights
    from opsin.engine.fallback import build_fallback
    from opsin.engine.model import pick_dtype

    model = build_fallback(folder, unknown)
    tensors = list(weights.all_tensors(weights.weight_files(folder)))
    dtype = pick_dtype(None, model.config, tensors)
    kind = str(dtype).removeprefix("torch.")
    return {
        "model_type": model.config.model_type,
        "takes": ["text", *model.family.modalities],
        "parameters": model.num_parameters,
        "dtype": kind,
        "kept_as": {kind: model.num_parameters},
        "max_positions": model.decoder.config.max_positions,
        "image_tokens": {},
        "cpu": "through its Transformers class, one request at a time: the slow path",
        "memory_bytes": {
            "weights": model.num_parameters * dtype.itemsize,
            "on_disk": sum(tensor.num_bytes for tensor in tensors),
            "cache_per_token": None,
            "cache": None,
            "cache_at_kv_bits": {},
        },
    }


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(
            f"{text!r} is no picture size", remedy="Write it like 1024x768", param="image-size"
        )
    return int(width), int(height)
