"""The seam between a family of models and the rest: what a family may state, and the common
case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import Rename
from opsin.decoder.config import DecoderConfig
from opsin.decoder.decoder import Decoder
from opsin.errors import CheckpointError, InputError
from opsin.families.mlx_names import MLXNames
from opsin.families.speaking import Speaker
from opsin.kernels import Kernels
from opsin.media.sampling import Chooser, Video
from opsin.towers import pixels
from opsin.types import Grounding, Task, Timings


@dataclass(slots=True, eq=False)
class MediaInput:
    """One picture, sound or video made ready for a tower, and the text that stands for it.

    `features` are the tower's inputs. `text` replaces the placeholder in the rendered prompt and
    holds the family's media token `num_tokens` times; `indices` (num_tokens,) are the positions of
    those in the prompt, filled when the prompt is tokenised. `size` is the original (width, height)
    and `processed_size` what the tower sees; `key` identifies content and settings together.
    `source_tokens` rows of it are read by cross-attention layers. `picture` is the original where
    a caller asked to keep it. `num_frames` counts the frames that were looked at of a video; where
    these are pictures, the first of them counts all. With `levels` features of type uint8 are the
    levels of pixels, a quarter of what the tower's values take: `value` makes these of them.
    """

    kind: str
    features: dict[str, Tensor]
    text: str
    num_tokens: int
    size: tuple[int, int] = (0, 0)
    processed_size: tuple[int, int] = (0, 0)
    key: bytes = b""
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    details: dict[str, Any] = field(default_factory=dict)
    source_tokens: int = 0
    picture: Image.Image | None = None
    num_frames: int = 0
    levels: pixels.Normalisation | None = None

    def value(self, name: str) -> Tensor:
        """A feature as the tower takes it."""
        stored = self.features[name]
        if self.levels is None or stored.dtype != torch.uint8:
            return stored
        return pixels.normalised_frames(stored, *self.levels)


def features_of(items: Sequence[MediaInput], name: str) -> Tensor:
    """A feature of several media one after another; of one alone as it is, not a copy.

    Levels stay what they are, unless a caller gave some of the media values of its own.
    """
    parts = [item.features[name] for item in items]
    if len({part.dtype for part in parts}) > 1:
        parts = [item.value(name) for item in items]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a tower made of one MediaInput.

    embeds (num_tokens, hidden) take the place of the media token's embeddings, or, with `adds`, are
    added to them; layer_adds[i], of
    the same shape, is added to the decoder's stream at those positions after layer i. source
    (source_tokens, hidden) is what cross-attention layers read. Without embeds the medium has no
    tokens to replace. `kept` is for the request's speaker alone.
    """

    embeds: Tensor | None
    layer_adds: tuple[Tensor, ...] = ()
    source: Tensor | None = None
    adds: bool = False
    kept: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        held = (self.embeds, self.source, *self.layer_adds, *self.kept)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


@dataclass(frozen=True, slots=True)
class SourceViews:
    """Which rows of all media's source each token of a prompt sees in cross-attention layers.

    views (views, rows) are True where a row is seen; view_of (tokens,) is each prompt token's view,
    -1 for a token that sees none. Generated tokens see what the prompt's last one does.
    """

    views: Tensor
    view_of: Tensor

    @classmethod
    def whole(cls, rows: int, tokens: int) -> SourceViews:
        """Every one of so many tokens sees all of so many rows."""
        return cls(torch.ones(1, rows, dtype=torch.bool), torch.zeros(tokens, dtype=torch.long))


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt ready for the engine.

    positions (axes, tokens) are rope positions; `next_position` is that of the first generated
    token. `atomic_spans` are (start, end) runs of tokens that must be computed in one step because
    they see each other in both directions; of them, sees_ahead (tokens,) says which see later ones
    and are seen by earlier ones, None for all. Requests with different `cache_salt` share no cache.
    expert_groups (tokens,) sends each token to a group of experts; None is group 0 for all.
    adapter is the number of the low-rank adapter that computes it, None for the model as it is.

    Where an encoder reads the prompt, encoder_ids are its tokens, in which the media stand, and
    token_ids those that the decoder starts from; source rows are the encoder's states.
    """

    token_ids: list[int]
    positions: Tensor
    next_position: int
    media: list[MediaInput] = field(default_factory=list)
    atomic_spans: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""
    timings: Timings = field(default_factory=Timings)
    source: SourceViews | None = None
    cache_salt: bytes = b""
    expert_groups: Tensor | None = None
    adapter: int | None = None
    encoder_ids: list[int] | None = None
    sees_ahead: Tensor | None = None

    @property
    def text_ids(self) -> list[int]:
        """The tokens of the prompt's text, whether the decoder or an encoder reads them."""
        return self.token_ids if self.encoder_ids is None else self.encoder_ids


class Family:
    """What differs in one family; every member has a default, and the default is the commonest
    case.

    One instance belongs to one checkpoint and holds its configs. Class attributes:

    modalities       which media it takes, in the order "image", "video", "audio"
    message_format   the name of the `MessageFormat` its chat template expects
    placeholders     for each kind of media, the text that stands for it in a rendered prompt
    media_tokens     for each kind, the token that embeddings replace; default: the placeholder
    stand_ins        kinds that the chat template knows as another one: a video as a picture
    rename, ignored  rules from checkpoint names to ours, and patterns of tensors to leave out
    one_picture      a prompt holds one picture at most
    bare_prompt      the prompt is the last message's text alone, without a chat template
    tokenizer_frame  the tokenizer puts its special tokens around the prompt, where it would
    text_apart       the text before, between and after media is tokenised piece by piece, each
                     as a prompt of its own
    processor_options  the `processor_kwargs` that reach `prepare_image` and its siblings
    grounding        how its answers write boxes and points; of several ways the first that finds
                     something counts. A family that pads or crops a picture puts a `Frame` into
                     the MediaInput's details, under "frame"
    tasks            what it was trained to do, by name
    sampling_rate    samples a second of the sounds that `prepare_audio` takes
    default_template the chat template of checkpoints that are published without one, or with one
                     that `template_serves` rejects
    template_variables  what the chat template is given beside the conversation
    adapter_folders  folders beside the weights that may hold the family's adapters once more, and
                     what each is called within the weights; `adapters_beside` says that the
                     checkpoint has them there alone
    no_repeat_ngram  (size, window, allowed tokens): no run of `size` generated tokens comes twice
                     within `window` of them (None: at all), unless it ends in an allowed one
    answer_tokens    tokens that belong to an answer's text even where the tokenizer calls them
                     special; a tokenizer whose files lack them gets them, in this order
    decoder_start    the tokens that the decoder starts from where an encoder reads the prompt;
                     none where the decoder reads it
    mlx_names        what mlx-vlm calls its weights; None where that is not known
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    message_format: ClassVar[str] = "list_with_image"
    placeholders: ClassVar[Mapping[str, str]] = {"image": "<image>"}
    media_tokens: ClassVar[Mapping[str, str]] = {}
    stand_ins: ClassVar[Mapping[str, Literal["image", "audio"]]] = {}
    rename: tuple[Rename, ...] = ()
    ignored: tuple[str, ...] = ()
    one_picture: ClassVar[bool] = False
    bare_prompt: ClassVar[bool] = False
    tokenizer_frame: ClassVar[bool] = True
    text_apart: ClassVar[bool] = False
    processor_options: ClassVar[tuple[str, ...]] = ()
    sampling_rate: ClassVar[int] = 16000
    default_template: str | None = None
    template_variables: Mapping[str, Any] = MappingProxyType({})
    grounding: tuple[Grounding, ...] = ()
    tasks: Mapping[str, Task] = MappingProxyType({})
    adapter_folders: Mapping[str, str] = MappingProxyType({})
    adapters_beside: bool = False
    no_repeat_ngram: tuple[int, int | None, tuple[str, ...]] | None = None
    answer_tokens: tuple[str, ...] = ()
    decoder_start: tuple[int, ...] = ()
    mlx_names: MLXNames | None = None

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        self.config = config
        self.processor_config = processor_config

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the decoder."""
        return self.config.get("text_config") or self.config

    def require(self, config: Mapping[str, Any], name: str) -> Any:
        """A config value that has no default.

        Raises CheckpointError naming it if the checkpoint does not state it.
        """
        if config.get(name) is None:
            raise CheckpointError(
                "The checkpoint's config.json is incomplete",
                why=f"{name} is missing",
                remedy="Use the config.json that the model's authors published",
            )
        return config[name]

    # What the model is made of.

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        """Look at the checkpoint's tensors, not yet read, for what its configs do not say.

        Called once, before `decoder`; does nothing by default.
        """

    def read_generation(self, stated: Mapping[str, Any]) -> None:
        """Take over how the checkpoint keeps from repeating itself, by its generation_config.json.

        Called once, before `decoder`, with nothing in it where there is no such file.
        """
        if size := stated.get("no_repeat_ngram_size"):
            self.no_repeat_ngram = (int(size), None, ())

    def decoder(self) -> DecoderConfig:
        """The decoder's shape."""
        raise NotImplementedError

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        """The encoders and projectors, by the names that `rename` gives their weights."""
        raise NotImplementedError

    def connect(self, decoder: Decoder, towers: nn.ModuleDict) -> None:
        """Give the decoder what it needs of the towers' weights.

        Called once, when every weight is in place; does nothing by default.
        """
        del decoder, towers

    def take_slice(self, name: str, config: Path | None) -> None:
        """Be one of the smaller models within this one; called, if at all, before `decoder`.

        config: a table of them in place of the family's own. Raises InputError if there is none of
        that name, or none at all.
        """
        del config
        raise InputError(
            f"There is no slice {name!r}",
            why=f"models of type {self.config['model_type']!r} hold no smaller ones",
            remedy="Leave it out",
            param="matformer_slice",
        )

    def sliced(self, tensor: StoredTensor) -> StoredTensor:
        """What a slice keeps of a tensor; all of it by default."""
        return tensor

    def apart(self, tensor: StoredTensor) -> Sequence[StoredTensor]:
        """A tensor that holds what lies elsewhere in the decoder, cut up; itself by default.

        The names of the parts are what `rename` and `inspect` see.
        """
        return (tensor,)

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        """An RGB picture to the tower's input and the text that stands for it."""
        raise NotImplementedError

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        """A sound, float32 (samples,) at `sampling_rate`, to the tower's input and its text."""
        raise NotImplementedError

    @property
    def takes(self) -> tuple[str, ...]:
        """What may be given: its modalities, and videos where frames can stand in as pictures."""
        shows_frames = "image" in self.modalities and not self.one_picture
        return tuple(dict.fromkeys((*self.modalities, *(("video",) if shows_frames else ()))))

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser | None:
        """Which frames of a video are looked at; None means evenly, at the request's rate.

        options: the request's `fps` and `max_frames`, where it states them.
        """
        del options
        return None

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        """The chosen frames of a video, with their times, to the tower's input and its text."""
        raise NotImplementedError

    def template_serves(self, source: str) -> bool:
        """Whether a checkpoint's own chat template can be used; if not, the default one is."""
        del source
        return True

    def media_token(self, kind: str) -> str:
        """The token that a kind's embeddings replace."""
        return self.media_tokens.get(kind, self.placeholders[kind])

    def media_token_id(self, kind: str) -> int | None:
        """The id of a kind's media token that the tokenizer does not know; None if there is none.

        Such a token cannot stand in the text: `with_media` puts it among the text's tokens.
        """
        del kind
        return None

    def with_media(
        self, token_ids: list[int], media: Sequence[MediaInput], ids: Mapping[str, int]
    ) -> list[int]:
        """The tokens of an expanded prompt with those of media that its text does not hold.

        `ids` gives the media token's id by kind.
        """
        del media, ids
        return token_ids

    def check_media(self, media: Sequence[MediaInput]) -> None:
        """Raise InputError for more media than a prompt of this family holds."""
        pictures = sum(item.kind == "image" for item in media)
        if self.one_picture and pictures > 1:
            raise InputError(
                f"This model reads one picture at a time, and {pictures} came",
                remedy="Ask about each in a request of its own",
                param="image",
            )

    def together(self, media: list[MediaInput]) -> list[MediaInput]:
        """The media of one prompt, where what becomes of each depends on how many there are.

        Called before `expand`. What differs is a value of its own, with a key of its own. The same
        by default.
        """
        return media

    def text_runs(self, text: str) -> Sequence[str]:
        """The runs of a prompt's text that are tokenised each on its own; one by default.

        Only without a `tokenizer_frame`.
        """
        return (text,)

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """A rendered prompt with each placeholder replaced by what stands for that medium.

        Raises InputError unless there are as many placeholders of each kind as media. Linear in
        the length of the text.
        """
        for kind in self.modalities:
            if kind in self.stand_ins:
                continue
            pieces = text.split(self.placeholders[kind])
            items = [item for item in media if self.stand_ins.get(item.kind, item.kind) == kind]
            if len(pieces) - 1 != len(items):
                raise InputError(
                    f"The prompt has a place for {len(pieces) - 1} {kind}s but {len(items)} came",
                    why=f"each {self.placeholders[kind]!r} in it stands for one",
                    remedy="Send one for each, and leave that word out of plain text",
                    param="prompt",
                )
            joined = [pieces[0]]
            for item, piece in zip(items, pieces[1:], strict=True):
                joined += (item.text, piece)
            text = "".join(joined)
        return text

    def locate(
        self, token_ids: Sequence[int], media: Sequence[MediaInput], ids: Mapping[str, int]
    ) -> None:
        """Fill every medium's `indices`: where its tokens stand in the tokenised prompt.

        `ids` gives the media token's id by kind; kinds that share a token stand in the order of
        `media`. Raises InputError if their number is not the media's.
        """
        tokens = torch.tensor(token_ids)
        for token_id, kind in {ids[kind]: kind for kind in reversed(self.modalities)}.items():
            places = (tokens == token_id).nonzero().flatten()
            items = [item for item in media if ids[item.kind] == token_id]
            counts = [item.num_tokens for item in items]
            if len(places) != sum(counts):
                raise InputError(
                    f"The prompt holds {len(places)} {kind} tokens where {sum(counts)} belong",
                    why=f"{self.media_token(kind)!r} stands in the text itself",
                    remedy="Leave that word out of the text",
                    param="prompt",
                )
            for item, indices in zip(items, places.split(counts), strict=True):
                item.indices = indices

    def positions(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> tuple[Tensor, int]:
        """Rope positions (axes, tokens) of a prompt, and the position of the token after it."""
        del media
        return torch.arange(len(token_ids))[None], len(token_ids)

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """Runs of tokens that see each other in both directions; none by default."""
        del token_ids, media
        return []

    def sees_ahead(self, token_ids: Sequence[int], media: Sequence[MediaInput]) -> Tensor | None:
        """Which tokens of atomic spans see later ones, and are seen by earlier ones, (tokens,).

        None, by default, for all. Not for layers that run natively or keep latent vectors.
        """
        del token_ids, media
        return None

    def expert_groups(self, token_ids: Sequence[int]) -> Tensor | None:
        """Which group of experts each token goes to; None is group 0 for all."""
        del token_ids
        return None

    def adapter(self, media: Sequence[MediaInput]) -> int | None:
        """Which of the decoder's adapters computes a request that holds these media."""
        del media
        return None

    def name_tokens(self, name_of: Callable[[int], str | None]) -> None:
        """Look up, by id, tokens that a family's configs number but do not name.

        Called once, before any prompt is made; does nothing by default.
        """

    def source_views(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> SourceViews | None:
        """What each token sees of the media in cross-attention layers; None if it has none."""
        del token_ids, media
        return None

    # What the towers do.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        """Run the towers over media of one kind, several requests' together."""
        raise NotImplementedError

    def encode_prompts(
        self, towers: nn.ModuleDict, embeds: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Run the encoder over prompts of `lengths` tokens, one after another: embeds (tokens,
        hidden), those of media in place, to states of the same shape.
        """
        raise NotImplementedError

    # What comes out.

    def speaker(self, prompt: Prompt, towers: nn.ModuleDict) -> Speaker | None:
        """What a request may say beside the vocabulary's tokens; None for nothing.

        Called once for each request. The decoder's config says `open_stream`.
        """
        del prompt, towers
        return None

    def written(self, token_ids: Sequence[int]) -> str | None:
        """An answer's text as its own tokens, beyond the vocabulary, make it.

        None where it holds none, and the tokenizer says it all.
        """
        del token_ids
        return None

    def extra_eos(self) -> tuple[str, ...]:
        """Tokens that end an answer beside those the checkpoint's configs name."""
        return ()


def check_options(family: Family, options: Mapping[str, Any]) -> None:
    """Refuse a processor option that the family does not have, by name."""
    for name in options:
        if name not in family.processor_options:
            known = ", ".join(family.processor_options) or "none"
            raise InputError(
                f"Unknown processor option {name!r}",
                why=f"this model's options are: {known}",
                param="processor_kwargs",
            )
