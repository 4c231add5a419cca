"""A checkpoint's tokenizer: text to token ids and back, and the special tokens by name and id."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from opsin.checkpoint.config import read_json
from opsin.errors import CheckpointError
from opsin.prompt.special_tokens import (
    read_tokenizer_config,
    special_token_map,
    unnamed_special_tokens,
)
from opsin.prompt.tokenizer_files import read_backend

_CONFIGS_WITH_EOS = ("text_config", "llm_config", "language_config")


class Tokenizer:
    """A `tokenizers` tokenizer with what the files beside it say of special tokens.

    named_tokens: special tokens by name, such as `bos_token` -> "<s>"; special_tokens: all that
    decoding can leave out; eos_token_ids: those that end an answer; vocab_size: one more than the
    highest id. Padding, truncation and clean-up of spaces are off.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str] | None = None,
        *,
        unnamed_special: Iterable[str] = (),
        eos_token_ids: Collection[int] = (),
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._tokens: dict[int, str] = {}  # those asked for: the backend takes a lock for each
        self.named_tokens: dict[str, str] = dict(named_tokens or {})
        listed = dict.fromkeys([*self.named_tokens.values(), *unnamed_special])
        backend.add_special_tokens(
            [tokenizers.AddedToken(text, special=True) for text in listed if text]
        )
        own = [] if self.eos_id is None else [self.eos_id]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_token_ids, *own]))

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        extra_eos: Iterable[str] = (),
        answer_tokens: Iterable[str] = (),
    ) -> "Tokenizer":
        """The tokenizer of a checkpoint folder.

        `extra_eos` are further tokens that end an answer, `answer_tokens` tokens that it gets after
        all others where its files lack them.

        Raises CheckpointError where its files are missing or broken, MissingDependency where they
        need an optional package to be read.
        """
        folder = Path(folder)
        config = read_tokenizer_config(folder)
        backend, own_names = read_backend(folder, config)
        extra = [backend.token_to_id(token) for token in extra_eos]
        lacking = [token for token in answer_tokens if backend.token_to_id(token) is None]
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in lacking])
        return cls(
            backend,
            own_names | special_token_map(config),
            unnamed_special=unnamed_special_tokens(config),
            eos_token_ids=[*stated_eos_ids(folder), *(i for i in extra if i is not None)],
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one.

        The text of a special token becomes that token.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a rendered prompt.

        Special tokens are put around it unless it already starts with the first of them: many
        templates write the beginning-of-sequence token that the tokenizer would add again. This is
        the rule of Transformers' processors.
        """
        bos = self.named_tokens.get("bos_token")
        return self.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, or None if the vocabulary lacks it."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary writes it, or None."""
        token: str | None = self._tokens.get(token_id)
        if token is None:
            token = self.backend.id_to_token(token_id)
            if token is not None:
                self._tokens[token_id] = token
        return token

    def special_id(self, name: str) -> int | None:
        """The id of a named special token, such as `image_token`."""
        text = self.named_tokens.get(name)
        return None if text is None else self.token_to_id(text)

    def require_id(self, token: str) -> int:
        """The id of a token the checkpoint cannot do without; CheckpointError if it has none."""
        token_id = self.token_to_id(token)
        if token_id is None:
            raise CheckpointError(
                f"The tokenizer has no token {token!r}", remedy="Download the checkpoint again"
            )
        return token_id

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-sequence token."""
        return self.special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own end-of-sequence token."""
        return self.special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The padding token."""
        return self.special_id("pad_token")

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The tokens outside the trained vocabulary, special or not, that are never split."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in sorted(added.items())}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding leaves out when it skips special tokens."""
        ids = (self.token_to_id(token) for token in self.special_tokens)
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens as text, by id."""
        added = sorted(self.backend.get_added_tokens_decoder().items())
        return tuple(token.content for _, token in added if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)


def stated_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer, by `generation_config.json`, else by the model's config."""
    generation = _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    if generation:
        return generation
    config = read_json(folder / "config.json")
    for section in (config, *(config.get(name) or {} for name in _CONFIGS_WITH_EOS)):
        if ids := _ids(section.get("eos_token_id")):
            return ids
    return ()


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and item >= 0)
