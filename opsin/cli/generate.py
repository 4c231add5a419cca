"""`opsin generate`: one prompt in, an answer streamed to the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli.flags import (
    FPS,
    SAMPLING,
    ChatTemplate,
    Device,
    KVBits,
    KVGroupSize,
    MatFormerConfig,
    MatFormerSlice,
    MaxFrames,
    MaxKVSize,
    MinP,
    Model,
    Quant,
    QuantizedKVStart,
    RepackedCache,
    RepetitionPenalty,
    Revision,
    Speculative,
    Temperature,
    TopK,
    TopP,
    UseAudioInVideo,
    json_option,
    load_with_progress,
    note_window,
)
from opsin.errors import InputError

if TYPE_CHECKING:
    from opsin.api import GenerationResult

MEDIA = "Media"
PROMPT = "Prompt"
OUTPUT = "Output"


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]... PROMPT",
            help="The prompt; pictures may stand before it. `-` reads the prompt from stdin.",
        ),
    ] = None,
    model: Model = "bundled",
    image: Annotated[
        list[str] | None,
        typer.Option(help="A picture: file, URL or data URL. Repeatable.", rich_help_panel=MEDIA),
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option(help="A sound. Repeatable.", rich_help_panel=MEDIA)
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="A video. Repeatable.", rich_help_panel=MEDIA)
    ] = None,
    fps: FPS = None,
    max_frames: MaxFrames = None,
    use_audio_in_video: UseAudioInVideo = False,
    resize_shape: Annotated[
        list[int] | None,
        typer.Option(
            help="Resize pictures first: once for both sides, or twice, height then width.",
            rich_help_panel=MEDIA,
        ),
    ] = None,
    processor_kwargs: Annotated[
        str | None,
        typer.Option(help="The family's picture options, as JSON.", rich_help_panel=MEDIA),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-i", help="The prompt.", rich_help_panel=PROMPT)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="One of the model's own tasks: `opsin models tasks NAME` lists them.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message.", rich_help_panel=PROMPT)
    ] = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="Variables for the chat template, as JSON.", rich_help_panel=PROMPT),
    ] = None,
    enable_thinking: Annotated[
        bool | None,
        typer.Option(
            "--enable-thinking/--no-thinking",
            help="Let a thinking model think first, or not.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens to generate.", rich_help_panel=SAMPLING)
    ] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    repetition_context_size: Annotated[
        int | None,
        typer.Option(help="How far back it looks; all by default.", rich_help_panel=SAMPLING),
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option(
            help="No run of so many tokens twice; 0 is off, the model's habit by default.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    no_repeat_ngram_window: Annotated[
        int | None,
        typer.Option(help="How many tokens back that looks.", rich_help_panel=SAMPLING),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Repeat a sampled answer.", rich_help_panel=SAMPLING)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the answer. Repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            help="Hold the answer to the JSON schema in a file.",
            metavar="FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(help="Hold the answer to a regular expression.", rich_help_panel=OUTPUT),
    ] = None,
    prefill_step_size: Annotated[
        int, typer.Option(help="Prompt tokens computed at once.", rich_help_panel="Engine")
    ] = 2048,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = 64,
    quantized_kv_start: QuantizedKVStart = 5000,
    max_kv_size: MaxKVSize = None,
    speculative: Speculative = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; the checkpoint's by default.",
            rich_help_panel="Engine",
        ),
    ] = None,
    quant: Quant = None,
    repacked_cache: RepackedCache = None,
    revision: Revision = None,
    matformer_config: MatFormerConfig = None,
    matformer_slice: MatFormerSlice = None,
    annotate: Annotated[
        Path | None,
        typer.Option(
            help="Save the picture with the answer's boxes and points drawn.",
            metavar="OUT.png",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="text or json.", rich_help_panel=OUTPUT)
    ] = "text",
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Print tokens/s, times and memory.", rich_help_panel=OUTPUT
        ),
    ] = False,
) -> None:
    """Answer one prompt, with or without pictures."""
    if output_format not in ("text", "json"):
        raise InputError(
            f"Unknown format {output_format!r}", remedy="Use text or json", param="format"
        )
    pictures, question = split_words(words or [], image or [], prompt, has_task=task is not None)
    if annotate is not None:
        check_annotate(annotate, pictures)
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "repetition_context_size": repetition_context_size,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "no_repeat_ngram_window": no_repeat_ngram_window,
        "seed": seed,
        "stop": stop,
        "task": task,
        "prefill_step_size": prefill_step_size,
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "quantized_kv_start": quantized_kv_start,
        "max_kv_size": max_kv_size,
        "speculative": speculative,
        "fps": fps,
        "max_frames": max_frames,
        "use_audio_in_video": use_audio_in_video,
        "resize_shape": resize_shape or None,
        "processor_kwargs": json_option("--processor-kwargs", processor_kwargs),
        "enable_thinking": enable_thinking,
        "chat_template_kwargs": json_option("--chat-template-kwargs", chat_template_kwargs),
        "json_schema": None if json_schema is None else schema_in(json_schema),
        "regex": regex,
    }
    loaded, processor = load_with_progress(
        model,
        device=device,
        dtype=dtype,
        quantize=quant,
        repacked_cache=repacked_cache,
        revision=revision,
        chat_template=chat_template,
        matformer_config=matformer_config,
        matformer_slice=matformer_slice,
    )
    note_window(max_kv_size)
    from opsin.api import ask

    answering = ask(
        loaded,
        processor,
        conversation(system, question),
        {"image": pictures, "audio": audio or [], "video": video or []},
        {name: value for name, value in sampling.items() if value is not None},
        whole=output_format == "json",
    )
    whole = show(iter(answering), output_format, verbose)
    if annotate is not None:
        save_annotated(whole, annotate)


def split_words(
    words: list[str], images: list[str], prompt: str | None, *, has_task: bool = False
) -> tuple[list[str], str]:
    """Pictures and prompt from the words of a command line.

    The last word is the prompt unless --prompt gave it; words before it are pictures. With a task
    there may be no prompt: then all words that are files or URLs are pictures.
    """
    if prompt is None and has_task and (not words or is_source(words[-1])):
        prompt = ""
    if prompt is None:
        if not words:
            raise InputError(
                "There is no prompt",
                remedy='Write it last: opsin generate --image FILE "What is this?"',
                param="prompt",
            )
        words, prompt = words[:-1], words[-1]
        if Path(prompt).is_file() and " " not in prompt:
            raise InputError(
                "There is no prompt",
                why=f"{prompt} is a file",
                remedy='Write the prompt last: opsin generate --image FILE "What is this?"',
                param="prompt",
            )
    if prompt == "-":
        prompt = sys.stdin.read()
    return [*images, *words], prompt


def schema_in(file: Path) -> dict[str, Any]:
    """The JSON schema that a file holds."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read", why=str(error), param="json_schema") from error
    schema = json_option("--json-schema", text)
    assert schema is not None
    return schema


def is_source(word: str) -> bool:
    """Whether a word is a picture's file or address."""
    return word.startswith(("http://", "https://", "data:")) or Path(word).is_file()


def check_annotate(out: Path, pictures: list[str]) -> None:
    """Refuse a place for the drawn picture that cannot be written, before anything is computed."""
    from PIL import Image

    if not pictures:
        raise InputError(
            "There is no picture to draw on", remedy="Give one with --image", param="annotate"
        )
    if not out.parent.is_dir():
        raise InputError(f"There is no folder {out.parent}", param="annotate")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise InputError(
            f"{out.name} names no kind of picture",
            remedy="Use a name that ends in .png or .jpg",
            param="annotate",
        )


def save_annotated(result: GenerationResult, out: Path) -> None:
    """Save the pictures with their regions; the second and later get a number in their name."""
    drawn = result.annotated()
    if not drawn:
        raise InputError(
            f"{out} was not written",
            why="the answer holds no boxes or points that this model's family is known to write",
            remedy="Ask for boxes or points, in the words the model was trained on",
            param="annotate",
        )
    for number, picture in enumerate(drawn, 1):
        name = out if number == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        try:
            picture.save(name)
        except OSError as error:
            raise InputError(
                f"{name} cannot be written", why=error.strerror or str(error), param="annotate"
            ) from error


def conversation(system: str | None, question: str) -> str | list[dict[str, Any]]:
    """The prompt, with a system message before it if there is one."""
    if system is None:
        return question
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def show(
    results: Iterator[GenerationResult], output_format: str, verbose: bool
) -> GenerationResult:
    """Print an answer as it comes, or as one JSON object at its end; the whole of it."""
    from opsin.api import figures, fold

    if output_format == "json":
        whole = fold(results)
        typer.echo(json.dumps(as_json(whole), ensure_ascii=False))
        return whole
    kept = []
    thought = ""  # the end of it
    for result in results:
        if result.reasoning:  # beside the answer, which may go on to a file
            typer.secho(result.reasoning, nl=False, err=True, dim=True)
            thought = result.reasoning
        if result.text and thought:
            typer.echo("" if thought.endswith("\n") else "\n", nl=False, err=True)
            thought = ""
        typer.echo(result.text, nl=False)
        sys.stdout.flush()
        kept.append(result)
    typer.echo()
    whole = fold(iter(kept))
    if verbose:
        typer.echo(figures(whole), err=True)
    elif whole.video_frames:
        counts = " + ".join(map(str, whole.video_frames))
        typer.echo(f"opsin: looked at {counts} frames of video", err=True)
    return whole


def as_json(result: GenerationResult) -> dict[str, Any]:
    """A result as plain JSON values."""
    return {
        "text": result.text,
        **({"reasoning": result.reasoning} if result.reasoning else {}),
        "finish_reason": result.finish_reason,
        **({"video_frames": list(result.video_frames)} if result.video_frames else {}),
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "generation_tokens": result.generation_tokens,
            "total_tokens": result.total_tokens,
            "drafted_tokens": result.drafted_tokens,
            "accepted_tokens": result.accepted_tokens,
        },
        "prompt_tps": round(result.prompt_tps, 2),
        "generation_tps": round(result.generation_tps, 2),
        "peak_memory": round(result.peak_memory, 3),
        "timings": {k: round(v, 4) for k, v in dataclasses.asdict(result.timings).items()},
        "image_sizes": [list(size) for size in result.image_sizes],
        "regions": [region.to_dict() for region in result.regions],
        **({"layout": json.loads(result.layout.to_json())} if result.layout is not None else {}),
    }
