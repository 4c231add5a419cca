"""Reads `tekken.json`, a byte-level vocabulary that stands in place of a `tokenizer.json`."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from opsin.checkpoint.config import read_json
from opsin.errors import CheckpointError
from opsin.prompt.byte_level import CHAR_OF_BYTE

# The special tokens of files from before they were listed in the file itself, by rank.
_UNLISTED_SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_tekken(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a `tekken.json`, and its named special tokens.

    Special tokens have the lowest ids, then come the byte strings by rank. Merges are every split
    of a byte string into two others, in the order of the string's rank. Raises CheckpointError.
    """
    held = read_json(path)
    try:
        config: Mapping[str, Any] = held["config"]
        specials = _special_tokens(held, config)
        size = config.get("default_vocab_size")
        entries = held["vocab"] if size is None else held["vocab"][: size - len(specials)]
        ranked = [base64.b64decode(entry["token_bytes"]) for entry in entries]
        pattern = Regex(config["pattern"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(
            f"{path.name} cannot be read", why=f"{type(error).__name__} at {error}"
        ) from error
    vocab = {token: rank for rank, token in enumerate(specials)}
    texts = [_as_text(raw) for raw in ranked]
    vocab |= {text: rank + len(specials) for rank, text in enumerate(texts)}
    merges = _merges(ranked, texts)
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    names = {name: token for name, token in _NAMES.items() if token in vocab}
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer, names


def _special_tokens(held: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Special tokens by rank, unnamed ones filled in up to the number the file reserves."""
    listed = held.get("special_tokens")
    if listed is None:
        named = list(_UNLISTED_SPECIALS)
    else:
        by_rank = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
        named = [by_rank[rank] for rank in range(len(by_rank))]
    reserved = config.get("default_num_special_tokens") or len(named)
    return named + [f"<SPECIAL_{rank}>" for rank in range(len(named), reserved)]


def _merges(ranked: list[bytes], texts: list[str]) -> list[tuple[str, str]]:
    """Every split of a byte string into two known ones, by its rank and then by theirs."""
    rank_of = {raw: rank for rank, raw in enumerate(ranked)}
    find = rank_of.get
    merges: list[tuple[str, str]] = []
    for raw in ranked:
        splits = []
        for at in range(1, len(raw)):
            left, right = find(raw[:at]), find(raw[at:])
            if left is not None and right is not None:
                splits.append((left, right))
        splits.sort()
        merges += [(texts[left], texts[right]) for left, right in splits]
    return merges


def _as_text(raw: bytes) -> str:
    return "".join(map(CHAR_OF_BYTE.__getitem__, raw))
