"""Tokenizers as checkpoints carry them, beside what Transformers makes of the same folder."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opsin.errors import CheckpointError, MissingDependency
from opsin.prompt.byte_level import CHAR_OF_BYTE, token_bytes
from opsin.prompt.tokenizer import Tokenizer
from tests.families import tiny_tokenizer

TEXTS = [
    "",
    "Hello world",
    "  leading and  double  spaces ",
    "Naïve café 图片里有什么 😀👍\n\n\tx",
    "<|im_start|>user\nHi<|im_end|>",
    "<s>[INST] Hi [/INST]",
    "a<image>b",
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    tiny_tokenizer.byte_level(SPECIAL).save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "image_token": "<image>",
        "added_tokens_decoder": {},
    }
    write(tmp_path, "tokenizer_config.json", config)
    return tmp_path


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    tiny_tokenizer.sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "added_tokens_decoder": {},
    }
    write(tmp_path, "tokenizer_config.json", config)
    return tmp_path


@pytest.mark.parametrize("kind", ["byte_level", "with_bos"])
@pytest.mark.parametrize("text", TEXTS)
def test_it_is_transformers_tokenizer(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.added_tokens == theirs.added_tokens_encoder
    assert ours.eos_id == theirs.eos_token_id
    assert set(theirs.all_special_tokens) <= set(ours.special_tokens)


def test_a_rendered_prompt_has_one_beginning(with_bos: Path) -> None:
    tokenizer = Tokenizer.from_folder(with_bos)
    bos = tokenizer.bos_id
    assert tokenizer.encode_prompt("Hi")[0] == bos
    assert tokenizer.encode_prompt("<s>Hi").count(bos) == 1
    assert tokenizer.encode("<s>Hi").count(bos) == 2


def test_padding_and_truncation_of_the_file_are_off(byte_level: Path) -> None:
    backend = Backend.from_file(str(byte_level / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(byte_level / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(byte_level)
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert len(tokenizer.encode("x")) == 1


def test_tokens_that_only_the_config_names(byte_level: Path) -> None:
    config = {
        "added_tokens_decoder": {"9000": {"content": "<extra>", "special": False}},
        "extra_special_tokens": ["<audio>"],
        "boi_token": "<boi>",
    }
    write(byte_level, "tokenizer_config.json", config)
    theirs = PreTrainedTokenizerFast.from_pretrained(byte_level)
    ours = Tokenizer.from_folder(byte_level)
    for token in ("<extra>", "<audio>", "<boi>"):
        assert ours.token_to_id(token) == theirs.convert_tokens_to_ids(token)
        assert ours.encode(f"a{token}b") == theirs.encode(f"a{token}b")
    assert ours.decode(ours.encode("a<extra><audio><boi>b")) == "a<extra>b"
    assert ours.special_id("boi_token") == ours.require_id("<boi>")
    assert ours.special_id("eoi_token") is None
    with pytest.raises(CheckpointError, match="<eoi>"):
        ours.require_id("<eoi>")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ["<|im_end|>"]),
        ({"config.json": {"eos_token_id": 5}}, [5, "<|im_end|>"]),
        ({"config.json": {"text_config": {"eos_token_id": [5, 6]}}}, [5, 6, "<|im_end|>"]),
        (
            {
                "config.json": {"eos_token_id": 5},
                "generation_config.json": {"eos_token_id": [7, 8]},
            },
            [7, 8, "<|im_end|>"],
        ),
        ({"generation_config.json": {"eos_token_id": 7}}, [7, "<|im_end|>"]),
        ({"generation_config.json": {"eos_token_id": None}}, ["<|im_end|>"]),
        ({"config.json": {"eos_token_id": -1}}, ["<|im_end|>"]),
    ],
)
def test_what_ends_an_answer(byte_level: Path, files: dict[str, Any], expected: list[Any]) -> None:
    for name, value in files.items():
        write(byte_level, name, value)
    tokenizer = Tokenizer.from_folder(byte_level, extra_eos=("<|endoftext|>", "<none>"))
    ids = [tokenizer.require_id(item) if isinstance(item, str) else item for item in expected]
    ids.insert(-1, tokenizer.require_id("<|endoftext|>"))
    assert list(tokenizer.eos_token_ids) == ids


def test_vocab_and_merges(tmp_path: Path) -> None:
    whole = tiny_tokenizer.byte_level(
        ("<s>", "</s>", "<image>"), split=r"'\w+| ?\w+| ?[^\s\w]+|\s+"
    )
    whole.model.save(str(tmp_path))
    write(tmp_path, "added_tokens.json", {"<image>": whole.token_to_id("<image>")})
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write(tmp_path, "tokenizer_config.json", config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in TEXTS[1:4]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("<image>")) == 1
    write(
        tmp_path, "tokenizer_config.json", {**config, "add_bos_token": True, "add_eos_token": True}
    )
    ours = Tokenizer.from_folder(tmp_path)
    ids = ours.encode("Hi")
    assert (ids[0], ids[-1]) == (ours.bos_id, ours.eos_id)


def sentencepiece_folder(folder: Path, **settings: Any) -> None:
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(tiny_tokenizer.CORPUS[:5] * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    write(
        folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}
    )


def test_sentencepiece_goes_through_transformers(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    sentencepiece_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in TEXTS[1:4]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_id == theirs.eos_token_id


def test_a_class_of_the_folder_s_own_is_not_run(tmp_path: Path) -> None:
    """What its sentencepiece model says of spaces counts instead."""
    pytest.importorskip("google.protobuf")
    import sentencepiece

    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece_folder(tmp_path, add_dummy_prefix=False, **kept)
    own = "tokenization_own.OwnTokenizer"
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [own, None]},
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    )
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('this must not run')")
    ours = Tokenizer.from_folder(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("You are helpful.", "  two  spaces é", "a"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_without_transformers_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'opsin\[transformers\]'"):
        Tokenizer.from_folder(tmp_path)


def test_vocab_and_merges_of_another_class_need_that_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer.byte_level(()).model.save(str(tmp_path))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "It's 2024, don't you see?"
    assert Tokenizer.from_folder(tmp_path).encode(text) == theirs.encode(text)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match="transformers"):
        Tokenizer.from_folder(tmp_path)


def tekken_file(folder: Path, listed: bool) -> None:
    """The vocabulary of a small byte-level tokenizer as tekken.json."""
    whole = tiny_tokenizer.byte_level(())
    ranked = sorted(whole.get_vocab().items(), key=lambda item: item[1])
    raw = sorted((token_bytes(token) for token, _ in ranked), key=lambda b: (len(b) > 1, 0))
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    held: dict[str, Any] = {
        "config": {
            "pattern": tiny_tokenizer.GPT4_SPLIT,
            "default_vocab_size": 30 + len(raw),
            "default_num_special_tokens": 30,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(b).decode(), "token_str": None}
            for rank, b in enumerate(raw)
        ]
        + [{"rank": len(raw), "token_bytes": base64.b64encode(b"beyond").decode()}],
    }
    if listed:
        held["special_tokens"] = [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(names)
        ]
    write(folder, "tekken.json", held)


def test_tekken(tmp_path: Path) -> None:
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    tekken_file(tmp_path, listed=True)
    theirs = convert_tekken_tokenizer(str(tmp_path / "tekken.json"))
    ours = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
    ids = ours.encode_prompt("<s>[INST]Hi[/INST]")
    assert ids[:2] == [1, 3]
    assert ours.encode_prompt("Hi")[0] == 1
    assert ours.decode(ids) == "Hi"
    assert ours.eos_token_ids == (2,)
    assert ours.id_to_token(29) == "<SPECIAL_29>"
    assert ours.token_to_id("beyond") is None


def test_older_tekken_files_list_no_special_tokens(tmp_path: Path) -> None:
    tekken_file(tmp_path, listed=False)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.token_to_id("[IMG]") == 10
    assert tokenizer.token_to_id("[TOOL_CALLS]") == 9


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    write(tmp_path, "tekken.json", {"config": {}})
    with pytest.raises(CheckpointError, match=r"tekken\.json"):
        Tokenizer.from_folder(tmp_path)
    write(tmp_path, "tokenizer.json", {"model": 3})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_the_byte_alphabet() -> None:
    assert len(set(CHAR_OF_BYTE)) == 256
    assert token_bytes("".join(CHAR_OF_BYTE)) == bytes(range(256))
    assert token_bytes("Ġa") == b" a"
    assert token_bytes("漢") == "漢".encode()
