"""From messages and media to a prompt: template, preprocessing, tokens, positions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from opsin import families
from opsin.checkpoint.config import Config, read_config, read_processor_config
from opsin.engine.grammar import Grammars
from opsin.engine.prepared_cache import PreparedCache, prepared_key
from opsin.errors import CheckpointError, InputError, UnsupportedMedia
from opsin.families.base import Family, MediaInput, Prompt, SourceViews, check_options
from opsin.media.cancellation import Cancellation
from opsin.media.fetched import FetchedCache
from opsin.media.key import array_key, image_key
from opsin.media.limits import DEFAULT_LIMITS, MediaLimits
from opsin.media.loading import load
from opsin.media.memory import Memory
from opsin.prompt.api import apply_chat_template
from opsin.prompt.documents import NUM_FRAMES, SOUND, is_replaced, pages_of, with_pages
from opsin.prompt.messages import Prompt as PromptForm
from opsin.prompt.messages import parse_messages
from opsin.prompt.template import ChatTemplate
from opsin.prompt.tokenizer import Tokenizer
from opsin.types import Media, Message, Part, Text, Timings

GENERAL_OPTIONS = ("resize_shape",)
KINDS = ("image", "video", "audio")  # the order in which media beside the messages stand


class Processor:
    """What stands before a model: tokenizer, chat template and the family's preprocessing.

    `limits` bounds what media may be read. One processor serves any number of threads.
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> None:
        self.family = family
        self.config = config
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.limits = limits
        self.fetched = FetchedCache()
        self.prepared = PreparedCache()
        family.name_tokens(tokenizer.id_to_token)
        self.eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self.grammars = Grammars(tokenizer, self.eos_token_ids)
        self.pointing_metadata: Mapping[str, Any] | None = None
        self.media_token_ids = {kind: self._token_id(kind) for kind in family.modalities}
        answer_ids = map(tokenizer.token_to_id, family.answer_tokens)
        self.answer_ids = frozenset(token_id for token_id in answer_ids if token_id is not None)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        chat_template: str | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> Processor:
        """The processor of a checkpoint folder.

        `chat_template` (text, a file or the name of a bundled one) replaces its own.
        """
        config = read_config(folder)
        family = families.load(config, read_processor_config(folder))
        tokenizer = Tokenizer.from_folder(folder, family.extra_eos(), family.answer_tokens)
        template = ChatTemplate.from_folder(folder)
        unfit = template is None or not family.template_serves(template.sources.get("default", ""))
        if unfit and family.default_template is not None:
            template = ChatTemplate.from_text(
                family.default_template, template.variables if template is not None else None
            )
        if chat_template is not None:
            template = ChatTemplate.from_user(
                families.bundled_template(chat_template) or chat_template,
                template.variables if template is not None else None,
            )
        if template is not None and family.template_variables:
            known = {**template.variables, **family.template_variables}
            template = replace(template, variables=known)
        return cls(family, config, tokenizer, template, limits)

    def _token_id(self, kind: str) -> int:
        token = self.family.media_token(kind)
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            token_id = self.family.media_token_id(kind)
        if token_id is None:
            raise CheckpointError(
                "The checkpoint's tokenizer does not fit its model_type",
                why=f"it has no token {token!r}",
                remedy="Use the tokenizer files that the model's authors published",
            )
        return token_id

    def prepare(
        self,
        prompt: PromptForm,
        *,
        images: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        frames: Mapping[str, Any] | None = None,
        keep_pictures: bool = False,
        salt: bytes = b"",
        cancellation: Cancellation | None = None,
        **template: Any,
    ) -> Prompt:
        """A prompt ready for the engine.

        prompt: messages in any accepted form, or a string. A string that holds one of the
        tokenizer's special tokens is taken as formatted already; any other is one user message.
        Media given beside the messages go into the first user message. `options` are the family's
        processor options, `template` what the chat template is given. `frames` are the `fps`,
        `max_frames` and `use_audio_in_video` of videos that do not state theirs. `keep_pictures`
        leaves the decoded originals on the prompt's media. Prompts of different `salt` share
        nothing that was fetched, prepared or computed. `cancellation` ends fetching and decoding,
        with a MediaTimeout.
        """
        beside = [Media("image", source) for source in images]
        rate = {"fps": template["fps"]} if isinstance(template.get("fps"), int | float) else {}
        sampled = {**rate, **(frames or {})}
        beside += [Media("video", source, sampled) for source in videos]
        beside += [Media("audio", source) for source in audios]
        timings = Timings()
        if any(self._is_replaced(item) for item in beside):
            self._check_modalities(beside)
            beside = pages_of(beside, self.limits, timings, cancellation, frames=self._shows_frames)
            beside.sort(key=lambda item: KINDS.index(item.kind))  # sounds of videos are last
            videos = () if self._shows_frames else videos
        if isinstance(prompt, str) and self.is_formatted(prompt):
            text, held = prompt, beside
        else:
            prompt = self._with_pages(prompt, frames or {}, timings, cancellation)
            held = self._in_order(prompt, beside)
            self._check_modalities(held)
            text = self._render(prompt, held, videos, template)
        self._check_modalities(held)
        check_options(self.family, _without(options or {}, GENERAL_OPTIONS))
        ready = [
            self._ready(item, options or {}, timings, keep_pictures, salt, cancellation)
            for item in held
        ]
        prompt_of_all = self.assemble(text, ready, timings)
        prompt_of_all.cache_salt = salt
        return prompt_of_all

    def is_formatted(self, text: str) -> bool:
        """Whether a string is a rendered prompt rather than something a person wrote."""
        if self.family.bare_prompt or self.chat_template is None:
            return any(placeholder in text for placeholder in self.family.placeholders.values())
        return any(token in text for token in self.tokenizer.special_tokens)

    @property
    def _shows_frames(self) -> bool:
        """Whether a video reaches the model as pictures of its frames."""
        return "video" in self.family.takes and "video" not in self.family.modalities

    def _is_replaced(self, item: Media) -> bool:
        return is_replaced(item, frames=self._shows_frames)

    def _with_pages(
        self,
        prompt: PromptForm,
        frames: Mapping[str, Any],
        timings: Timings,
        cancellation: Cancellation | None,
    ) -> PromptForm:
        """The prompt with pictures in place of documents, and of videos it does not take."""
        messages = parse_messages(prompt)
        if frames:
            messages = tuple(_sampled(message, frames) for message in messages)
            prompt = messages if any(message.media for message in messages) else prompt
        held = [item for message in messages for item in message.media]
        if not any(self._is_replaced(item) for item in held):
            return prompt
        self._check_modalities(held)
        return with_pages(messages, self.limits, timings, cancellation, frames=self._shows_frames)

    def _in_order(self, prompt: PromptForm, beside: Sequence[Media]) -> list[Media]:
        """All media in the order in which the rendered prompt names them."""
        messages = parse_messages(prompt)
        roles = [message.role for message in messages]
        target = len(messages) - 1 if self.family.bare_prompt else None
        if target is None and "user" in roles:
            target = roles.index("user")
        held: list[Media] = []
        for i, message in enumerate(messages):
            if i == target:
                held.extend(beside)
            held.extend(message.media)
        return held

    def _render(
        self,
        prompt: PromptForm,
        held: Sequence[Media],
        videos: Sequence[Any],
        template: Mapping[str, Any],
    ) -> str:
        variables = dict(template)
        if self.family.stand_ins:
            prompt, held = self._stood_in(prompt, held)
        elif videos:
            variables["video"] = list(videos)
        text = apply_chat_template(
            self,
            self.config,
            prompt,
            num_images=sum(item.kind == "image" for item in held),
            num_audios=sum(item.kind == "audio" for item in held),
            **variables,
        )
        if not isinstance(text, str):
            raise InputError("The last message is not plain text", param="prompt")
        return text

    def _stood_in(
        self, prompt: PromptForm, held: Sequence[Media]
    ) -> tuple[PromptForm, Sequence[Media]]:
        """A prompt and its media as the chat template knows them: some kinds as another one."""
        kinds = self.family.stand_ins

        def shown(part: Part) -> Part:
            if isinstance(part, Text) or part.kind not in kinds:
                return part
            return Media(kinds[part.kind], part.source)

        if not isinstance(prompt, str):
            prompt = tuple(
                replace(message, content=tuple(shown(part) for part in message.content))
                for message in parse_messages(prompt)
            )
        return prompt, [Media(kinds.get(item.kind, item.kind), item.source) for item in held]

    def _check_modalities(self, held: Sequence[Media]) -> None:
        heard = [Media("audio", item.source) for item in held if item.options.get(SOUND)]
        for item in (*held, *heard):
            if item.modality not in self.family.takes:
                takes = ", ".join(("text", *self.family.takes))
                raise UnsupportedMedia(
                    f"This model does not take {item.kind}",
                    why=f"{self.config.model_type} takes {takes}",
                    remedy="Choose a model that does",
                    param=item.kind,
                )

    def _ready(
        self,
        item: Media,
        options: Mapping[str, Any],
        timings: Timings,
        keep_pictures: bool,
        salt: bytes,
        cancellation: Cancellation | None,
    ) -> MediaInput:
        """Fetch, decode and preprocess one medium, as far as that was not done before.

        What a message states beside a medium comes before the request's options.
        """
        known = self.family.processor_options
        own = {name: value for name, value in item.options.items() if name in known}
        settings = {**_without(options, GENERAL_OPTIONS), **own}
        stated = [sorted(each.items()) for each in (settings, item.options)]
        facts = (item.kind, stated, options.get("resize_shape"))

        def recall(digest: bytes) -> MediaInput | None:
            key = prepared_key(salt, digest, facts)
            return self.prepared.get(key, with_picture=keep_pictures and item.kind == "image")

        memory = Memory(self.fetched, salt, recall)
        loaded = load(item, self.limits, memory, cancellation, **self._load_settings(item))
        timings.fetch += loaded.timing.fetch
        timings.decode += loaded.timing.decode
        if isinstance(loaded.value, MediaInput):
            return loaded.value
        started = time.perf_counter()
        ready = self._prepared(item.kind, loaded.value, settings, options, keep_pictures)
        ready.num_frames = ready.num_frames or item.options.get(NUM_FRAMES, 0)
        if memory.digest:
            self.prepared.put(prepared_key(salt, memory.digest, facts), ready)
        timings.preprocess += time.perf_counter() - started
        return ready

    def _load_settings(self, item: Media) -> dict[str, Any]:
        """How a medium is decoded for this model."""
        if item.kind == "audio":
            return {"sample_rate": self.family.sampling_rate}
        if item.kind == "video":
            return {"choose": self.family.frame_chooser(item.options)}
        return {}

    def _prepared(
        self,
        kind: str,
        value: Any,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        keep_pictures: bool,
    ) -> MediaInput:
        """Preprocess a decoded medium; the key names content and settings."""
        if kind == "audio":
            ready = self.family.prepare_audio(value, settings)
            ready.key = array_key(value, sorted(settings.items()))
        elif kind == "video":
            ready = self.family.prepare_video(value, settings)
            ready.size = (value.info.width, value.info.height)
            ready.num_frames = len(value.frames)
            ready.key = array_key(
                value.frames, value.timestamps, value.duration, sorted(settings.items())
            )
        else:
            assert isinstance(value, Image.Image)
            image = resized(value, options.get("resize_shape"))
            ready = self.family.prepare_image(image, settings)
            ready.size = value.size
            ready.picture = value if keep_pictures else None
            ready.key = image_key(image, sorted(settings.items()))
        return ready

    def assemble(
        self, text: str, ready: list[MediaInput], timings: Timings | None = None
    ) -> Prompt:
        """A rendered prompt and its prepared media to tokens and positions."""
        self.family.check_media(ready)
        ready = self.family.together(ready)
        expanded = self.family.expand(text, ready)
        if not self.family.text_apart:
            return self.of_tokens(self._piece_ids(expanded), ready, expanded, timings)
        token_ids, rest = [], expanded
        for item in ready:
            piece, _, rest = rest.partition(item.text)
            token_ids += self._piece_ids(piece)
            token_ids += self.tokenizer.encode(item.text, add_special_tokens=False)
        token_ids += self._piece_ids(rest)
        return self.of_tokens(token_ids, ready, expanded, timings)

    def _piece_ids(self, text: str) -> list[int]:
        if self.family.tokenizer_frame:
            return self.tokenizer.encode_prompt(text)
        ids: list[int] = []
        for run in self.family.text_runs(text):
            ids += self.tokenizer.encode(run, add_special_tokens=False)
        return ids

    def of_tokens(
        self,
        token_ids: list[int],
        ready: Sequence[MediaInput] = (),
        text: str = "",
        timings: Timings | None = None,
    ) -> Prompt:
        """The prompt that tokens and the media among them are."""
        family, media = self.family, list(ready)
        token_ids = family.with_media(token_ids, media, self.media_token_ids)
        family.locate(token_ids, media, self.media_token_ids)
        encoder_ids = None
        source = family.source_views(token_ids, media)
        if family.decoder_start:
            encoder_ids, token_ids = token_ids, list(family.decoder_start)
            source = SourceViews.whole(len(encoder_ids), len(token_ids))
        positions, following = family.positions(token_ids, media)
        return Prompt(
            token_ids,
            positions,
            following,
            media,
            family.atomic_spans(token_ids, media),
            text,
            timings or Timings(),
            source,
            expert_groups=family.expert_groups(token_ids),
            adapter=family.adapter(media),
            encoder_ids=encoder_ids,
            sees_ahead=family.sees_ahead(token_ids, media),
        )


def _sampled(message: Message, frames: Mapping[str, Any]) -> Message:
    """A message whose videos are sampled so where they do not say otherwise."""
    content = (
        replace(part, options={**frames, **part.options})
        if isinstance(part, Media) and part.kind == "video"
        else part
        for part in message.content
    )
    return replace(message, content=tuple(content))


def resized(image: Image.Image, shape: Any) -> Image.Image:
    """A picture at `resize_shape`: (height, width), or one number for both; None leaves it."""
    if shape is None:
        return image
    sides = [shape, shape] if isinstance(shape, int) else list(shape)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= 16384 for side in sides):
        raise InputError(
            f"resize_shape cannot be {shape!r}",
            remedy="Give one or two whole numbers of pixels, height and width",
            param="resize_shape",
        )
    return image.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)


def _without(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
