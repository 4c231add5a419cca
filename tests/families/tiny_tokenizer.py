"""Tiny tokenizers of the kinds that published checkpoints carry, trained in a few milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = (
    "Describe the picture in detail. What do you see in the image? A red square stands beside a",
    "blue circle on a white page. The quick brown fox jumps over the lazy dog near the river bank.",
    "user: How many shapes are there? assistant: There are three shapes: two circles, one square.",
    "Read the text in the document and convert it to markdown. Totals: 12.50, 7.25 and 310.00 EUR.",
    "You are a helpful assistant. Please compare both images and explain what is different.",
    "Naïve café, straße, 图片里有什么, привет мир, 😀👍.\n\nA new line;  two  spaces,\tand a tab.",
)

GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = GPT4_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint folder carries of its tokenizer."""

    tokenizer: Tokenizer
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return self.tokenizer.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """Tokens in all, the added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


def _special(tokens: Sequence[str], plain: Sequence[str] = ()) -> list[AddedToken]:
    return [AddedToken(token, special=token not in plain, normalized=False) for token in tokens]


def _template(
    ids: dict[str, int], prefix: str | None, suffix: str | None
) -> processors.TemplateProcessing:
    head, tail = [prefix] if prefix else [], [suffix] if suffix else []
    return processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        pair=[*head, "$A", *tail, *[f"{token}:1" for token in head], "$B:1", *tail],
        special_tokens=[(token, ids[token]) for token in {*head, *tail}],
    )


@lru_cache
def byte_level(
    special: tuple[str, ...],
    *,
    bos: str | None = None,
    suffix: str | None = None,
    split: str = GPT4_SPLIT,
    merges: int = 160,
    plain: tuple[str, ...] = (),
    first: bool = False,
) -> Tokenizer:
    """Byte-level BPE as GPT-2's successors use it (Qwen, Llama 3, Mistral's tekken, SmolLM).

    `special` are added after the vocabulary, or before it where `first`; those also in `plain` are
    not "special". With `bos` (and `suffix`), encoding a text puts it before (after) the text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges + (len(special) if first else 0),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_special(special, plain) if first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(_special(special, plain))
    byte_processor = processors.ByteLevel(trim_offsets=False)
    if bos or suffix:
        ids = tokenizer.get_vocab()
        byte_processor = processors.Sequence([byte_processor, _template(ids, bos, suffix)])
    tokenizer.post_processor = byte_processor
    return tokenizer


@lru_cache
def sentencepiece_like(
    first: tuple[str, ...] = ("<unk>", "<s>", "</s>"),
    special: tuple[str, ...] = (),
    *,
    bos: str | None = "<s>",
    suffix: str | None = None,
    prefix_space: bool = True,
    merges: int = 180,
    plain: tuple[str, ...] = (),
) -> Tokenizer:
    """BPE over "▁" with byte fallback: what sentencepiece vocabularies become (Llama 2, Gemma).

    `first` have the lowest ids, `special` the highest.
    """
    replace = normalizers.Replace(" ", "▁")
    steps = [normalizers.Prepend("▁"), replace] if prefix_space else [replace]
    scratch = Tokenizer(models.BPE())
    scratch.normalizer = normalizers.Sequence(steps)
    scratch.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁]+"), "isolated")
    bytes_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 256 + 128 + merges,
        special_tokens=[*first, *bytes_tokens],
        limit_alphabet=128,
        show_progress=False,
    )
    ascii_only = [line.encode("ascii", "ignore").decode() for line in CORPUS]
    scratch.train_from_iterator(ascii_only, trainer)
    vocabulary, merge_list = _parts(scratch)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merge_list,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(_special(first))
    tokenizer.add_tokens(_special(special, plain))
    if bos or suffix:
        tokenizer.post_processor = _template(tokenizer.get_vocab(), bos, suffix)
    return tokenizer


def _parts(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def files(
    tokenizer: Tokenizer,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    unk: str | None = None,
    extra: dict[str, Any] | None = None,
) -> TokenizerFiles:
    """A tokenizer with its tokenizer_config.json, named special tokens included."""
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    return TokenizerFiles(
        tokenizer,
        {
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            **(extra or {}),
        },
    )
