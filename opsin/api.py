"""The Python API: load a model, ask it about pictures, one question or many at once."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opsin.api_form import FORM_FIELDS, TOOL_FIELDS, wanted
from opsin.api_inputs import as_inputs, from_inputs
from opsin.checkpoint.hub import resolve
from opsin.engine.fallback import engine_of, load_fallback
from opsin.engine.form import AnswerForm, Wanted, template_tool
from opsin.engine.loop import Engine, EngineLimits, Stream
from opsin.engine.memory import peak_memory
from opsin.engine.model import Model, load_model
from opsin.engine.processor import Processor
from opsin.errors import InputError, UnknownFamily
from opsin.families.base import Prompt
from opsin.grounding import notebook
from opsin.grounding.drawing import as_png, draw_all
from opsin.grounding.layout import Layout
from opsin.grounding.parsing import pointing_metadata, regions_of
from opsin.grounding.regions import Region
from opsin.media.limits import DEFAULT_LIMITS, MediaLimits
from opsin.prompt.answer import joined
from opsin.prompt.api import apply_chat_template, get_message_json
from opsin.prompt.messages import Prompt as PromptForm
from opsin.prompt.tasks import find_task, task_messages
from opsin.types import Event, SamplingParams, Task, Timings, TokenLogprob, ToolCall

__all__ = [
    "GenerationResult",
    "apply_chat_template",
    "batch_generate",
    "generate",
    "generate_step",
    "get_message_json",
    "load",
    "prepare_inputs",
    "stream_generate",
]

DEFAULT_MODEL = "bundled"
SAMPLING_FIELDS = frozenset(f.name for f in dataclasses.fields(SamplingParams))
LIMIT_FIELDS = frozenset(f.name for f in dataclasses.fields(EngineLimits))
TEMPLATE_FIELDS = frozenset({"enable_thinking", "chat_template_kwargs", "chat_template"})
# How videos are taken: the kinds of values, and what they lie above and not above.
FRAME_LIMITS: dict[str, tuple[Any, float, float]] = {
    "fps": (int | float, 0, 1000),
    "max_frames": (int, 0, 100_000),
    "use_audio_in_video": (bool, -1, 1),
}
WANTED_FIELDS = frozenset({*FORM_FIELDS, *TOOL_FIELDS})
# Spellings of other libraries in this field, and the name each has here.
OTHER_NAMES = {
    "temp": "temperature",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """An answer, whole or so far.

    text: the answer; while streaming, what is new. reasoning: what a thinking model wrote before
    it. tool_calls: calls of tools, each with its name and its arguments as JSON text; while
    streaming, pieces of them. token: the last token's id; tokens: all of them. logprobs: each
    token's, if asked. prompt_tps, generation_tps: tokens a second. peak_memory: the process's, in
    GB (10^9 bytes). finish_reason: "stop", "length", "tool_calls", or None while streaming.
    timings: seconds by stage. image_sizes: (width, height) that each picture was processed at.
    regions: boxes, points and polygons of the whole answer, in pixels of the original pictures;
    layout: the page, where the task reads one. pictures: the originals, kept where there are
    regions (not by batch_generate). drafted_tokens, accepted_tokens: guesses that were computed
    (`speculative`), and those of them that were right. video_frames: how many frames of each video
    were looked at.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    peak_memory: float = 0.0
    finish_reason: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    timings: Timings = field(default_factory=Timings)
    image_sizes: tuple[tuple[int, int], ...] = ()
    regions: tuple[Region, ...] = ()
    layout: Layout | None = None
    pictures: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    video_frames: tuple[int, ...] = ()

    @property
    def token(self) -> int | None:
        """The last token's id."""
        return self.tokens[-1] if self.tokens else None

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.generation_tokens

    def annotated(self) -> list[Image.Image]:
        """The pictures that have regions, with these drawn on them."""
        return draw_all(self.pictures, self.regions)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the pictures with the regions; its text if there are none."""
        drawn = self.annotated()
        return as_png(drawn) if drawn else None

    def _repr_html_(self) -> str | None:
        """What a notebook shows of a page that was read: the picture with its parts, its text."""
        return None if self.layout is None else notebook.page(self.layout, self._repr_png_())

    def _repr_markdown_(self) -> str | None:
        """What a notebook shows of an answer without regions: its text, tables as tables."""
        shown_otherwise = self.regions or self.layout is not None
        return None if shown_otherwise else notebook.markdown(self.text)

    def __str__(self) -> str:
        return self.text


def load(
    path_or_hf_repo: str = DEFAULT_MODEL,
    *,
    quantize: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    chat_template: str | None = None,
    media_limits: MediaLimits = DEFAULT_LIMITS,
    matformer_config: str | None = None,
    matformer_slice: str | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    max_kv_size: int | None = None,
    speculative: str | None = None,
    repacked_cache: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, Processor]:
    """Load a checkpoint: a folder, a hub name, or "bundled", the small model in the package.

    quantize: 8 or 4, the bits that matrices are quantised to as they are read (at 4 the most
    sensitive take 6, and towers 8); None leaves them as they are stored. device: "cpu", "cuda",
    "cuda:N" or "mps"; None picks the best there is. dtype: "float32", "bfloat16" or "float16"; None
    takes the checkpoint's. revision: a branch, tag or commit of a hub name. chat_template: jinja
    text, a file, or the name of a bundled one, in place of the checkpoint's. matformer_slice: the
    name of a smaller model within a nested one, as in the table that comes with its family, or in
    the CSV file matformer_config. repacked_cache: "on", "off" or a folder in which packed
    weights are kept as the CPU's kernels read them, to be mapped the next time; None is what
    OPSIN_REPACKED_CACHE says, or else "auto": on where that takes little of the disk. on_progress
    is called with the bytes read so far and all. A model that has no family here runs through
    Transformers, where that is installed, and says so on stderr. kv_bits, kv_group_size,
    quantized_kv_start and max_kv_size are how keys and values are kept, and speculative is how
    tokens are guessed, as in EngineLimits, where a call does not say otherwise. Raises
    NotFoundError, CheckpointError, InputError, UnknownFamily or MissingDependency.
    """
    folder = resolve(path_or_hf_repo, revision=revision)
    try:
        processor = Processor.from_folder(folder, chat_template=chat_template, limits=media_limits)
    except UnknownFamily as unknown:
        ours_alone = (quantize, matformer_slice, matformer_config, kv_bits, max_kv_size)
        keeps = repacked_cache not in (None, "auto", "off")
        if keeps or any(given is not None for given in (*ours_alone, speculative)):
            raise
        return load_fallback(
            folder,
            unknown,
            device=device,
            dtype=dtype,
            chat_template=chat_template,
            limits=media_limits,
        )
    model = load_model(
        folder,
        quantize=quantize,
        device=device,
        dtype=dtype,
        matformer_config=matformer_config,
        matformer_slice=matformer_slice,
        repacked_cache=repacked_cache,
        on_progress=on_progress,
    )
    model.processor = processor
    model.limits = EngineLimits(
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        max_kv_size=max_kv_size,
        speculative=speculative,
    )
    model.limits.speculates(model.decoder.config)
    model.limits.cache_format(model.decoder.config)
    model.limits.kept_tokens(model.decoder.config)
    return model, processor


def engine_for(
    model: Model, processor: Processor, given: Mapping[str, Any] | None = None
) -> Engine:
    """The model's engine, made when first asked for and again when other limits are given."""
    limits = dataclasses.replace(model.limits, **(given or {}))
    engine = model.engine
    if isinstance(engine, Engine) and (engine.limits, engine.processor) == (limits, processor):
        return engine
    if isinstance(engine, Engine):
        engine.close()
    fresh = engine_of(model, processor, limits)
    model.engine = fresh
    return fresh


@dataclass(frozen=True, slots=True)
class _Options:
    """The keyword arguments of a generate call, by who they are for."""

    sampling: SamplingParams
    limits: dict[str, Any]
    template: dict[str, Any]
    processor: dict[str, Any]
    task: str | None
    wanted: Wanted
    frames: dict[str, Any]

    def prepare(
        self, processor: Processor, prompt: PromptForm, *, keep_pictures: bool, **media: Any
    ) -> _Asked:
        """The prompt ready for the engine, with what is needed to read its answer."""
        task = None if self.task is None else find_task(processor.family, self.task)
        if self.task is not None:
            prompt = task_messages(processor.family, self.task, prompt)
        grounds = bool(processor.family.grounding or (task and task.grounding))
        form = AnswerForm.of(processor, self.wanted, self.template.get("chat_template"))
        given = dict(self.template)
        if self.wanted.offered:
            given["tools"] = [template_tool(tool) for tool in self.wanted.offered]
        given |= {f"{kind}s": _media_list(value) for kind, value in media.items()}
        ready = processor.prepare(
            prompt,
            options=self.processor,
            frames=self.frames,
            keep_pictures=keep_pictures and grounds,
            **given,
        )
        return _Asked(processor, ready, task, self.sampling.logprobs is not None, form)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prepared prompt, and how its answer is to be read."""

    processor: Processor
    prompt: Prompt
    task: Task | None
    wants_logprobs: bool
    form: AnswerForm

    def start(self, engine: Engine, sampling: SamplingParams, *, whole: bool) -> Answering:
        """Queue the prompt with an engine; `whole`: nobody looks at the answer before its end."""
        guide = self.form.guide(self.prompt)
        ending = self.form.ending(sampling)
        keep = self.form.keep
        events = engine.stream(self.prompt, ending, guide=guide, keep=keep, whole=whole)
        return Answering(self, events)

    def read(self, result: GenerationResult, tokens: Sequence[int]) -> GenerationResult:
        """The last result with what all the answer's tokens say of places in the pictures."""
        media = self.prompt.media
        grounding = self.task.grounding if self.task else ()
        regions = regions_of(tokens, self.processor, media, grounding)
        pictures = tuple(item.picture for item in media if item.picture is not None)
        is_page = self.task is not None and self.task.layout
        return dataclasses.replace(
            result,
            regions=tuple(regions),
            layout=Layout.of(regions) if is_page else None,
            pictures=pictures if regions else (),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answering:
    """An answer that an engine is at work on."""

    asked: _Asked
    events: Stream

    def __iter__(self) -> Iterator[GenerationResult]:
        return _results(self.asked, self.events)

    def whole(self) -> GenerationResult:
        """The answer, once it is there."""
        return fold(iter(self))

    def cancel(self) -> None:
        """End it where it stands, from any thread: its reason to finish is then "cancelled"."""
        self.events.cancel()


def _options(arguments: Mapping[str, Any]) -> _Options:
    """Sort keyword arguments; an unknown one is an InputError that names it."""
    given = {OTHER_NAMES.get(name, name): value for name, value in arguments.items()}
    processor = dict(given.pop("processor_kwargs", None) or {})
    if given.get("resize_shape") is not None:
        processor["resize_shape"] = given["resize_shape"]
    given.pop("resize_shape", None)
    task = given.pop("task", None)
    frames = _frame_options({name: given.pop(name, None) for name in FRAME_LIMITS})
    stop = given.get("stop")
    if stop is not None:
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    known = SAMPLING_FIELDS | LIMIT_FIELDS | TEMPLATE_FIELDS | WANTED_FIELDS
    for name in given:
        if name not in known:
            raise InputError(
                f"Unknown argument {name!r}",
                remedy="See help(opsin.generate) for those there are",
                param=name,
            )
    given = {name: value for name, value in given.items() if value is not None}
    return _Options(
        checked_sampling({k: v for k, v in given.items() if k in SAMPLING_FIELDS}),
        {k: v for k, v in given.items() if k in LIMIT_FIELDS},
        {k: v for k, v in given.items() if k in TEMPLATE_FIELDS},
        processor,
        task,
        wanted(given),
        frames,
    )


def _frame_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """How videos are taken, as far as it was asked for."""
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        kinds, least, most = FRAME_LIMITS[name]
        if not isinstance(value, kinds) or not least < value <= most:
            raise InputError(
                f"{name} cannot be {value!r}",
                remedy=f"Give a number above {least:g}, at most {most:g}",
                param=name,
            )
    if not given.get("use_audio_in_video"):
        given.pop("use_audio_in_video", None)
    return given


def checked_sampling(values: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from plain values; each out of its range is an InputError naming it."""
    ranges: dict[str, tuple[float, float]] = {
        "max_tokens": (1, 10_000_000),
        "temperature": (0, 100),
        "top_p": (0, 1),
        "top_k": (0, 10_000_000),
        "min_p": (0, 1),
        "repetition_penalty": (0.01, 100),
        "repetition_context_size": (0, 10_000_000),
        "no_repeat_ngram_size": (0, 10_000),
        "no_repeat_ngram_window": (1, 10_000_000),
        "presence_penalty": (-100, 100),
        "frequency_penalty": (-100, 100),
        "logprobs": (0, 20),
    }
    for name, (low, high) in ranges.items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name} must be a number, not {value!r}", param=name)
        if not low <= value <= high:
            raise InputError(
                f"{name} cannot be {value}",
                why=f"it lies between {low:g} and {high:g}",
                param=name,
            )
    if values.get("top_p") == 0:
        values = {**values, "top_p": 1e-9}
    return SamplingParams(**values)


def _media_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def stream_generate(
    model: Model,
    processor: Processor,
    prompt: PromptForm,
    image: Any = None,
    audio: Any = None,
    video: Any = None,
    **kwargs: Any,
) -> Iterator[GenerationResult]:
    """Answer as it comes: each result holds the new text, the last one the totals.

    Takes what `generate` takes. Closing the iterator cancels the request.
    """
    media = {"image": image, "audio": audio, "video": video}
    return iter(ask(model, processor, prompt, media, kwargs, whole=False))


def ask(
    model: Model,
    processor: Processor,
    prompt: PromptForm,
    media: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    whole: bool,
) -> Answering:
    """Start on an answer. media: by kind; arguments: the keyword ones of `generate`.

    With `whole` it comes in one result, which spares the rest of the machine's work a wake-up for
    each token.
    """
    options = _options(arguments)
    asked = options.prepare(processor, prompt, keep_pictures=True, **media)
    engine = engine_for(model, processor, options.limits)
    return asked.start(engine, options.sampling, whole=whole)


def _results(asked: _Asked, events: Stream) -> Iterator[GenerationResult]:
    sizes = tuple(item.processed_size for item in asked.prompt.media)
    frames = tuple(item.num_frames for item in asked.prompt.media if item.num_frames)
    tokens: list[int] = []
    reader = asked.form.reader(asked.prompt)
    for event in events:
        tokens += event.token_ids
        last = event.finish_reason is not None
        piece = reader.take(event)[0]
        result = GenerationResult(
            piece.text,
            tuple(event.token_ids),
            tuple(event.logprobs) if asked.wants_logprobs else None,
            reasoning=piece.reasoning,
            tool_calls=piece.calls,
            prompt_tokens=len(asked.prompt.text_ids),
            image_sizes=sizes,
            video_frames=frames,
        )
        if last:
            result = asked.read(_finished(result, event), tokens)
            if reader.num_calls and event.finish_reason == "stop":
                result = dataclasses.replace(result, finish_reason="tool_calls")
        yield result


def _finished(result: GenerationResult, event: Event) -> GenerationResult:
    timings, usage = event.timings or Timings(), event.usage
    prompt_seconds = timings.encode + timings.prefill
    return dataclasses.replace(
        result,
        generation_tokens=usage.generation_tokens,
        prompt_tps=usage.prompt_tokens / prompt_seconds if prompt_seconds > 0 else 0.0,
        generation_tps=(
            (usage.generation_tokens - 1) / timings.generate if timings.generate > 0 else 0.0
        ),
        peak_memory=peak_memory() / 1e9,
        finish_reason=event.finish_reason,
        timings=timings,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )


def fold(results: Iterator[GenerationResult]) -> GenerationResult:
    """One result out of a stream of them."""
    parts = list(results)
    logprobs = [lp for part in parts for lp in part.logprobs or ()]
    calls: list[ToolCall] = []
    for piece in (piece for part in parts for piece in part.tool_calls):
        calls = joined(calls, piece)
    return dataclasses.replace(
        parts[-1],
        text="".join(part.text for part in parts),
        reasoning="".join(part.reasoning for part in parts),
        tool_calls=tuple(calls),
        tokens=tuple(token for part in parts for token in part.tokens),
        logprobs=tuple(logprobs) if parts[-1].logprobs is not None else None,
    )


def generate(
    model: Model,
    processor: Processor,
    prompt: PromptForm,
    image: Any = None,
    audio: Any = None,
    video: Any = None,
    verbose: bool = False,
    **kwargs: Any,
) -> GenerationResult:
    """Answer a prompt about pictures.

    prompt: text, or messages; text that holds the chat template's special tokens is taken as it
    stands, any other as one user message. image: a path, URL, data URL, bytes, PIL image, array, or
    a list of them, put into the first user message.

    kwargs: the fields of SamplingParams (max_tokens, temperature, top_p, top_k, min_p,
    repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed, stop, logprobs, ...);
    of EngineLimits (prefill_step_size, memory, ...); `resize_shape` and `processor_kwargs`;
    `fps` and `max_frames`, which frames of videos are looked at, and `use_audio_in_video`;
    `enable_thinking` and `chat_template_kwargs`; `task`, one of the model's own (`opsin models
    tasks NAME` lists them), whose words are then the prompt. An unknown one is refused by name.

    One of `json_schema` (an object, its text or a pydantic model), `regex`, `choice` (texts),
    `grammar` (Lark) and `response_format` (as OpenAI's) holds the answer to a form. `tools` (as
    OpenAI's) may be called, by `tool_choice` ("auto", "none", "required" or a function) and
    `parallel_tool_calls`; the calls are in the result's `tool_calls`.

    verbose: print the answer as it comes and the figures at its end. Raises OpsinError.
    """
    media = {"image": image, "audio": audio, "video": video}
    answering = ask(model, processor, prompt, media, kwargs, whole=not verbose)
    if not verbose:
        return answering.whole()
    kept = []
    for result in answering:
        print(result.text, end="", flush=True)  # noqa: T201
        kept.append(result)
    whole = fold(iter(kept))
    print("\n" + figures(whole))  # noqa: T201
    return whole


def figures(result: GenerationResult) -> str:
    """Token counts, rates, times and memory of a result, in lines to print."""
    times = dataclasses.asdict(result.timings)
    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in times.items() if seconds)
    lines = [
        f"Prompt: {result.prompt_tokens} tokens, {result.prompt_tps:.1f} tokens/s",
        f"Answer: {result.generation_tokens} tokens, {result.generation_tps:.1f} tokens/s",
        f"Seconds: {stages}",
        f"Peak memory: {result.peak_memory:.2f} GB",
    ]
    if result.drafted_tokens:
        lines.insert(2, f"Guesses: {result.accepted_tokens} of {result.drafted_tokens} were right")
    if result.video_frames:
        lines.insert(1, f"Video: {' + '.join(map(str, result.video_frames))} frames looked at")
    return "\n".join(lines)


def batch_generate(
    model: Model,
    processor: Processor,
    images: Sequence[Any] | None = None,
    prompts: Sequence[PromptForm] = (),
    audios: Sequence[Any] | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> list[GenerationResult]:
    """Answer many prompts at once, one result for each, in order.

    images[i] (one picture, a list of them, or None) belongs to prompts[i]; audios likewise. With
    `verbose`, or on a terminal, a progress bar is shown. Takes the keyword arguments of `generate`.
    """
    for name, values in (("images", images), ("audios", audios)):
        if values is not None and len(values) != len(prompts):
            raise InputError(
                f"There are {len(values)} {name} for {len(prompts)} prompts",
                remedy="Give one for each prompt, None where there is none",
                param=name,
            )
    options = _options(kwargs)
    engine = engine_for(model, processor, options.limits)
    answers = []
    for i, prompt in enumerate(prompts):
        asked = options.prepare(
            processor,
            prompt,
            keep_pictures=False,
            image=images[i] if images is not None else None,
            audio=audios[i] if audios is not None else None,
        )
        answers.append(asked.start(engine, options.sampling, whole=True))
    return [answering.whole() for answering in _tracked(answers, verbose)]


def _tracked(items: list[Any], verbose: bool) -> Iterator[Any]:
    """The items, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if verbose or console.is_terminal:
        yield from track(items, "Generating", console=console)
    else:
        yield from items


def prepare_inputs(
    processor: Processor,
    images: Any = None,
    audio: Any = None,
    prompts: PromptForm = "",
    **kwargs: Any,
) -> dict[str, Tensor]:
    """What the model computes from, for one prompt; `generate_step` takes it back.

    input_ids and attention_mask are (1, tokens). The media's features come under their names
    (`pixel_values`, ...), those of several media one after another along the first axis, smaller
    ones filled up with zeros. The input_ids know where the media stand: pass them on as they are.
    What `extract_points_from_text` needs of the pictures is left in `processor.pointing_metadata`.
    """
    options = _options(kwargs)
    ready = options.prepare(
        processor, prompts, keep_pictures=False, image=images, audio=audio
    ).prompt
    processor.pointing_metadata = pointing_metadata(ready.media)
    return as_inputs(ready)


def generate_step(
    input_ids: Tensor | Sequence[int],
    model: Model,
    pixel_values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    **kwargs: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Generate token by token: pairs of (token, log probabilities of all tokens (vocab,)).

    Takes what `prepare_inputs` returns: its input_ids, pixel_values and attention_mask by position
    and the rest by name; and the sampling parameters of `generate`. Only masks of ones are taken,
    since one prompt has no padding.
    """
    features = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    mask = kwargs.pop("attention_mask", mask)
    features.pop("attention_mask", None)
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise InputError("The mask leaves tokens out", remedy="Leave them out of input_ids")
    plain = {k: v for k, v in kwargs.items() if k not in features}
    options = _options({"max_tokens": max_tokens, "temperature": temperature, **plain})
    if pixel_values is not None:
        features["pixel_values"] = pixel_values
    prompt = from_inputs(model, input_ids, features)
    seen: deque[Tensor] = deque()

    def keep(logits: Tensor, token_ids: Sequence[int], num_prompt: int) -> Tensor:
        del token_ids, num_prompt
        seen.append(logits.log_softmax(0))
        return logits

    if options.wanted.tools:
        raise InputError("Tools are part of a prompt", remedy="Use generate", param="tools")
    form = AnswerForm.of(model.processor, dataclasses.replace(options.wanted, is_chat=False))
    engine = engine_for(model, model.processor, options.limits)
    for event in engine.stream(prompt, options.sampling, (keep,), form.guide(prompt)):
        for token in event.token_ids:
            yield token, seen.popleft()
