"""Finds and reads the files a checkpoint keeps its tokenizer in."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from opsin.checkpoint.config import read_json
from opsin.errors import CheckpointError, MissingDependency
from opsin.prompt.special_tokens import special_token_map, unnamed_special_tokens
from opsin.prompt.tekken import read_tekken

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

# Classes whose vocab.json and merges.txt mean the plain byte-level rules of 2019; others split
# words by rules that only their class states.
_PLAIN_BYTE_LEVEL = ("", "GPT2Tokenizer", "BartTokenizer", "RobertaTokenizer")


def read_backend(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """A folder's tokenizer, and the special tokens that the files themselves name.

    `config` is its `tokenizer_config.json`. The first of these that is there: `tokenizer.json`,
    `tekken.json`, `vocab.json` with `merges.txt`, a sentencepiece model.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = _from_json(folder / "tokenizer.json")
        _add_listed_tokens(tokenizer, folder, config)
        return tokenizer, {}
    if (folder / "tekken.json").is_file():
        return read_tekken(folder / "tekken.json")
    has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if has_pair and kind in _PLAIN_BYTE_LEVEL:
        tokenizer = _from_vocab_and_merges(folder, config)
        _add_listed_tokens(tokenizer, folder, config)
        _set_bos_and_eos(tokenizer, config)
        return tokenizer, {}
    if has_pair:
        return _through_transformers(folder, config, ("transformers",))
    if any((folder / name).is_file() for name in _SENTENCEPIECE_FILES):
        needs = ("transformers", "sentencepiece", "google.protobuf")
        return _through_transformers(folder, config, needs)
    raise CheckpointError(
        "The checkpoint has no tokenizer",
        why="there is no tokenizer.json, tekken.json, vocab.json or tokenizer.model",
        remedy="Download the checkpoint again, with its tokenizer files",
    )


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{path.name} cannot be read", why=str(error), remedy="Download the file again"
        ) from error


def _from_vocab_and_merges(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    try:
        model = models.BPE(vocab, [(left, right) for left, _, right in pairs])
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            "The vocab.json and merges.txt do not fit together",
            why=str(error),
            remedy="Download both files again",
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _add_listed_tokens(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens that the configuration lists and the tokenizer lacks, by their ids."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or _older_listing(folder, config)
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        token = AddedToken(**entry)
        if token.content not in known:
            tokenizer.add_tokens([token])


def _older_listing(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """`added_tokens.json` in the form that `added_tokens_decoder` has."""
    special = {*special_token_map(config).values(), *unnamed_special_tokens(config)}
    return {
        int(token_id): {
            "content": text,
            "special": text in special,
            "normalized": text not in special,
        }
        for text, token_id in read_json(folder / "added_tokens.json").items()
    }


def _set_bos_and_eos(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Let encoding add the tokens that `add_bos_token` and `add_eos_token` ask for."""
    names = special_token_map(config)
    bos = names.get("bos_token") if config.get("add_bos_token") else None
    eos = names.get("eos_token") if config.get("add_eos_token") else None
    used = [token for token in (bos, eos) if token]
    if not used:
        return
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in used])
    head, tail = [bos] if bos else [], [eos] if eos else []
    around = processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
    )
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, around])


def _through_transformers(
    folder: Path, config: Mapping[str, Any], modules: Sequence[str]
) -> tuple[Tokenizer, dict[str, str]]:
    """Let Transformers convert a tokenizer; no code of the folder is run.

    Where the folder brings a class of its own, what the sentencepiece model says of itself counts.
    """
    for module in modules:
        _require(module)
    from transformers import AutoTokenizer, TokenizersBackend

    own = "AutoTokenizer" in (config.get("auto_map") or {}) and "sentencepiece" in modules
    try:
        loaded = (TokenizersBackend if own else AutoTokenizer).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            "The checkpoint's tokenizer cannot be read", why=str(error)
        ) from error
    if not loaded.is_fast:
        raise CheckpointError(
            "The checkpoint's tokenizer cannot be read",
            why="Transformers has no fast form of it",
            remedy="Use a checkpoint that ships tokenizer.json",
        )
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    return backend, {name: str(text) for name, text in loaded.special_tokens_map.items()}


def _require(module: str) -> None:
    """Raise MissingDependency unless a module of the converter's can be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            "This checkpoint's tokenizer needs a converter",
            why=f"the folder has no tokenizer.json, and Python has no {module}",
            remedy="pip install 'opsin[transformers]'",
        ) from error
