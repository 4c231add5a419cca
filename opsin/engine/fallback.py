"""Models that have no family here, run through their Transformers class: complete, but slow.

The model's own processor and `generate` do the work, one request at a time; choosing tokens,
stopping and streaming are ours, as everywhere. Needs the optional extra `opsin[transformers]`.
"""

from __future__ import annotations

import atexit
import copy
import importlib.util
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opsin.checkpoint.config import Config, read_config, read_processor_config
from opsin.engine.grammar import Guide
from opsin.engine.loop import STEP_ERRORS, Engine, EngineLimits, media_counts
from opsin.engine.model import Model, pick_device, pick_dtype
from opsin.engine.output import Output
from opsin.engine.processor import Processor
from opsin.engine.repetition import no_repeat_ngram
from opsin.engine.sampler import LogitsProcessor, Sampler
from opsin.engine.sequence import Sequence as EngineSequence
from opsin.errors import (
    EngineError,
    InputError,
    MissingDependency,
    OpsinError,
    PromptTooLong,
    QueueFull,
    UnknownFamily,
)
from opsin.families.base import Family, MediaInput, Prompt
from opsin.media.limits import DEFAULT_LIMITS, MediaLimits
from opsin.prompt.template import ChatTemplate
from opsin.prompt.tokenizer import Tokenizer
from opsin.types import Event, FinishReason, SamplingParams, Timings

LOG = logging.getLogger("opsin")
KINDS = {"image_processor": "image", "feature_extractor": "audio", "audio_processor": "audio"}
DEFAULT_POSITIONS = 2048


class FallbackFamily(Family):
    """Media are decoded and handed on; the model's own processor makes features of them."""

    modalities = ()
    message_format = "list_with_image_first"

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        details = {"value": image}
        return MediaInput("image", {}, "", 0, image.size, image.size, details=details)

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        del options
        return MediaInput("audio", {}, "", 0, details={"value": samples})


def family_for(kinds: Sequence[str], *, has_template: bool) -> type[FallbackFamily]:
    """The family of models that take these media; without a chat template a prompt is bare text."""
    facts: dict[str, Any] = {
        "modalities": tuple(dict.fromkeys(kinds)),
        "placeholders": {kind: f"<{kind}>" for kind in kinds},
    }
    if not has_template:
        facts |= {"message_format": "prompt_only", "bare_prompt": True}
    return type("Fallback", (FallbackFamily,), facts)


@dataclass(slots=True, eq=False)
class FallbackPrompt(Prompt):
    """A prompt with all that the reference's processor made, by its names."""

    inputs: dict[str, Tensor] = field(default_factory=dict)


class FallbackProcessor(Processor):
    """Our reading of messages and media before the model's own processor."""

    def __init__(self, reference: Any, *parts: Any) -> None:
        super().__init__(*parts)
        self.reference = reference
        self.prepared.max_bytes = 0  # preparing is the reference's affair: nothing would be spared

    def _token_id(self, kind: str) -> int:
        return -1  # where media stand is the reference's affair

    def assemble(
        self, text: str, ready: list[MediaInput], timings: Timings | None = None
    ) -> FallbackPrompt:
        media = {
            name: [item.details["value"] for item in ready if item.kind == kind]
            for kind, name in (("image", "images"), ("audio", "audio"))
        }
        begins = self.tokenizer.named_tokens.get("bos_token")
        given: dict[str, Any] = {name: values for name, values in media.items() if values}
        if begins and text.startswith(begins):
            given["add_special_tokens"] = False
        try:
            inputs = self.reference(text=[text], return_tensors="pt", **given)
        except (ValueError, TypeError, LookupError) as error:
            raise InputError(
                "The model's own processor refuses the request",
                why=str(error)[:300],
                remedy="Send the number of pictures that the model takes, beside the text",
                param="prompt",
            ) from error
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        ids = tensors["input_ids"][0].tolist()
        return FallbackPrompt(
            ids,
            torch.arange(len(ids))[None],
            len(ids),
            ready,
            text=text,
            timings=timings or Timings(),
            inputs=tensors,
        )


@dataclass(frozen=True, slots=True)
class FallbackShape:
    """What is asked of a decoder's config from outside the engine."""

    vocab_size: int
    max_positions: int


class FallbackDecoder(nn.Module):
    """The place where a model's shape is found."""

    def __init__(self, config: FallbackShape) -> None:
        super().__init__()
        self.config: Any = config


class FallbackModel(Model):
    """A Transformers model where one of ours is expected; `reference` is the model itself."""

    def __init__(self, family: Family, config: Config, reference: nn.Module, text: Any) -> None:
        nn.Module.__init__(self)
        self.family = family
        self.config = config
        self.reference: Any = reference
        shape = FallbackShape(
            int(text.get("vocab_size") or config.get("vocab_size") or 0),
            int(text.get("max_position_embeddings") or DEFAULT_POSITIONS),
        )
        self.decoder: Any = FallbackDecoder(shape)
        self.towers = nn.ModuleDict()
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters())
        self.engine: Any = None
        self.limits = EngineLimits()
        self.processor: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.reference.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.reference.parameters()).dtype


def require_transformers(config: Config, unknown: UnknownFamily) -> None:
    """Raise MissingDependency where the optional extra is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependency(
            f"Models of type {config.model_type!r} need Transformers here",
            why="Opsin has no family of its own for them, and the optional extra is not installed",
            remedy="pip install 'opsin[transformers]'",
            param="model",
        ) from unknown


def family_of(
    own: Any, config: Config, folder: Path, template: ChatTemplate | None
) -> FallbackFamily:
    """What stands for the family of a model, by the parts of its own processor."""
    kinds = [KINDS[name] for name in own.get_attributes() if name in KINDS]
    made = family_for(kinds, has_template=template is not None)
    return made(config, read_processor_config(folder))


def build_fallback(folder: Path, unknown: UnknownFamily) -> FallbackModel:
    """A model on the meta device, without its weights; raises as `load_fallback` does."""
    config = read_config(folder)
    require_transformers(config, unknown)
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    try:
        stated = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            reference = AutoModelForMultimodalLM.from_config(stated)
        own = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        unknown.add_note(f"Transformers: {error}")
        raise unknown from error
    family = family_of(own, config, folder, ChatTemplate.from_folder(folder))
    text = stated.get_text_config(decoder=True).to_dict()
    return FallbackModel(family, config, reference, text)


def load_fallback(
    folder: Path,
    unknown: UnknownFamily,
    *,
    device: str | None = None,
    dtype: str | None = None,
    chat_template: str | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> tuple[FallbackModel, FallbackProcessor]:
    """A checkpoint without a family as Transformers loads it; code in the checkpoint is not run.

    Says on stderr that this is the slow path. Raises MissingDependency without the extra, and
    `unknown` again where Transformers does not know the model either.
    """
    config = read_config(folder)
    require_transformers(config, unknown)
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    try:
        stated = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        place = pick_device(device)
        reference = AutoModelForMultimodalLM.from_pretrained(
            folder,
            config=stated,
            dtype=pick_dtype(dtype, config, []),
            use_safetensors=True,
            trust_remote_code=False,
        )
        own = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        unknown.add_note(f"Transformers: {error}")
        raise unknown from error
    LOG.warning(
        "Models of type %r run through Transformers, one request at a time: the slow path.",
        config.model_type,
    )
    template = ChatTemplate.from_folder(folder)
    if chat_template is not None:
        template = ChatTemplate.from_user(chat_template, template.variables if template else None)
    family = family_of(own, config, folder, template)
    tokenizer = Tokenizer.from_folder(folder)
    text = stated.get_text_config(decoder=True).to_dict()
    model = FallbackModel(family, config, reference.to(place).eval(), text)
    model.processor = FallbackProcessor(own, family, config, tokenizer, template, limits)
    return model, model.processor


@dataclass(slots=True, eq=False)
class _Request:
    """A request and how its tokens are chosen; called by `generate` with each step's logits."""

    sequence: EngineSequence
    sampler: Sampler
    output: Output
    on_event: Callable[[Event], None]
    max_context: int
    cancelled: bool = False
    reason: FinishReason | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose the next token from scores (1, vocab); no other is left to `generate`."""
        del input_ids
        sequence, logits = self.sequence, scores[0].float()
        token, logprob = int(logits.argmax()), None
        if not self.sampler.is_plain_greedy:
            token, logprob = self.sampler.sample(
                logits.clone(), sequence.token_ids, sequence.num_prompt
            )
        if sequence.num_generated == 0:
            sequence.first_token = time.perf_counter()
        sequence.token_ids.append(token)
        full = len(sequence.token_ids) >= self.max_context
        complete = self.sampler.accept(token)
        event, self.reason = self.output.push(token, logprob, out_of_room=full, complete=complete)
        if self.reason is None and event is not None:
            self.on_event(event)
        return torch.full_like(scores, -torch.inf).index_fill_(
            1, torch.tensor([token], device=scores.device), 0.0
        )


class _Ended:
    """Tells `generate` that a request is over."""

    def __init__(self, request: _Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """One truth value for the one sequence: (1,)."""
        del scores, others
        over = self.request.reason is not None or self.request.cancelled
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)


class FallbackEngine(Engine):
    """Answers one request after another with the model's own `generate`."""

    def __init__(
        self, model: Model, processor: Processor | None, limits: EngineLimits | None = None
    ) -> None:
        assert isinstance(model, FallbackModel)
        self.model: FallbackModel = model
        self.processor = processor
        self.limits = limits or EngineLimits()
        asked = {
            "kv_bits": self.limits.kv_bits,
            "max_kv_size": self.limits.max_kv_size,
            "speculative": self.limits.speculative,
        }
        for name, value in asked.items():
            if value is not None:
                raise InputError(
                    f"{name} cannot be used with this model",
                    why="it runs through Transformers, whose cache is not Opsin's",
                    remedy="Leave it out",
                    param=name,
                )
        self.max_context = self.limits.max_context or model.decoder.config.max_positions
        self.steps = 0
        self._ids = itertools.count()
        self._open: dict[int, _Request] = {}
        self._waiting: deque[int] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._answer_all, name="opsin-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        on_event: Callable[[Event], None],
        processors: Iterable[LogitsProcessor] = (),
        guide: Guide | None = None,
        keep: Collection[int] = (),
        whole: bool = False,
    ) -> int:
        """Queue a request, as of any engine; its prompt comes from a FallbackProcessor."""
        if not isinstance(prompt, FallbackPrompt):
            raise InputError("This model takes prompts that its own processor has prepared")
        if len(prompt.token_ids) >= self.max_context:
            raise PromptTooLong(
                f"The prompt has {len(prompt.token_ids)} tokens",
                why=f"the model takes {self.max_context} with the answer",
                remedy="Shorten it, or send fewer or smaller pictures",
                param="prompt",
            )
        request_id = next(self._ids)
        sequence = EngineSequence.start(request_id, prompt, sampling)
        tokenizer = None if self.processor is None else self.processor.tokenizer
        blocker = no_repeat_ngram(self.model.family, tokenizer, sampling)
        request = _Request(
            sequence,
            Sampler.of(sampling, [*blocker, *processors], guide),
            Output(sequence, self.processor, keep, whole),
            on_event,
            self.max_context,
        )
        with self._wake:
            if self._closing:
                raise EngineError("The engine is closed", remedy="Create another")
            if len(self._waiting) >= self.limits.max_queue:
                raise QueueFull("Too many requests are waiting", remedy="Try again later")
            self._open[request_id] = request
            self._waiting.append(request_id)
            self._wake.notify()
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request before its next token; one that waits ends at once."""
        with self._wake:
            request = self._open.get(request_id)
            if request is None:
                return
            request.cancelled = True
            if request_id not in self._waiting:
                return
            self._waiting.remove(request_id)
            del self._open[request_id]
        request.on_event(request.output.last("cancelled"))

    def close(self) -> None:
        """Cancel what runs and what waits, and end the thread."""
        with self._wake:
            self._closing = True
            for request in self._open.values():
                request.cancelled = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def stats(self) -> dict[str, Any]:
        """Counts for health checks and metrics; there is no cache of ours to count."""
        with self._wake:
            waiting = len(self._waiting)
            running = len(self._open) - waiting
        absent = ("free_blocks", "num_blocks", "kept_blocks")
        encoded = ("encoded_hits", "encoded_misses", "encoded_bytes")
        counts = dict.fromkeys((*absent, *encoded), 0)
        counts |= media_counts(self.processor)
        return {"running": running, "waiting": waiting, **counts, "steps": self.steps}

    # In the engine's thread.

    def _answer_all(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._closing):
                    self._wake.wait()
                if not self._waiting:
                    return
                request_id = self._waiting.popleft()
                request = self._open[request_id]
            error: Exception | None = None
            try:
                if not request.cancelled:
                    self._answer(request)
            except STEP_ERRORS as failure:
                error = failure
            with self._wake:
                del self._open[request_id]
            request.on_event(self._last(request, error))

    def _last(self, request: _Request, error: Exception | None) -> Event:
        if error is None:
            return request.output.last(
                "cancelled" if request.cancelled else request.reason or "length"
            )
        if not isinstance(error, OpsinError):
            failure = EngineError("The request failed inside the engine", why=type(error).__name__)
            failure.__cause__ = error
            error = failure
        return request.output.last("error", error)

    def _answer(self, request: _Request) -> None:
        sequence, prompt = request.sequence, request.sequence.prompt
        assert isinstance(prompt, FallbackPrompt)
        sequence.started = time.perf_counter()
        model = self.model
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in prompt.inputs.items()
        }
        settings = copy.deepcopy(model.reference.generation_config)
        settings.update(
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            eos_token_id=None,
            pad_token_id=settings.pad_token_id or 0,
            max_length=None,
            max_new_tokens=sequence.sampling.max_tokens,
        )
        with torch.inference_mode():
            model.reference.generate(
                **inputs,
                generation_config=settings,
                logits_processor=[request],
                stopping_criteria=[_Ended(request)],
            )
        self.steps += sequence.num_generated


def engine_of(model: Model, processor: Processor, limits: EngineLimits | None = None) -> Engine:
    """The engine that runs a model: ours, or the slow one for a model of Transformers'."""
    kind = FallbackEngine if isinstance(model, FallbackModel) else Engine
    return kind(model, processor, limits)
