"""Streaming text equals the text decoded at once, and holds whole characters only."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from opsin.prompt import detokenize
from opsin.prompt.detokenize import Detokenizer, WindowAssembler, assembler_for
from opsin.prompt.tokenizer import Tokenizer
from tests.families import tiny_tokenizer

SPECIAL = ("<|im_end|>", "<think>")


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.byte_level(SPECIAL))


@cache
def llama_like() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.sentencepiece_like(special=("<image>",)))


@cache
def gemma_like() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.sentencepiece_like(prefix_space=False))


@cache
def metaspace() -> Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        *((piece, -1.0) for piece in ["▁", "▁▁", "▁the", "the", "a▁b", "漢", "é"]),
    ]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


@cache
def word_pieces() -> Tokenizer:
    vocab = {word: index for index, word in enumerate(["[UNK]", "a", "##b", "the", "##é", "."])}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend)


@cache
def no_decoder() -> Tokenizer:
    return Tokenizer(Backend(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama_like": llama_like,
    "gemma_like": gemma_like,
    "metaspace": metaspace,
    "word_pieces": word_pieces,
    "no_decoder": no_decoder,
}


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "llama_like", "gemma_like"])
@given(st.text(max_size=30))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_ids_give_what_decoding_gives(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]()
    numbers = [
        token_id
        for token_id in range(tokenizer.vocab_size + 2)
        if not (tokenizer.id_to_token(token_id) or "").startswith("<0x")
    ]
    ids = data.draw(st.lists(st.sampled_from(numbers), max_size=20))
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@given(st.lists(st.integers(0, 255), max_size=12))
@settings(deadline=None)
def test_byte_tokens_that_are_no_text(values: list[int]) -> None:
    tokenizer = gemma_like()
    ids = [tokenizer.require_id(f"<0x{value:02X}>") for value in values]
    text = "".join(streamed(tokenizer, ids))
    try:
        assert text == bytes(values).decode()
    except UnicodeDecodeError:
        assert "\ufffd" in text
        assert text == bytes(values).decode(errors="replace")


def test_half_a_character_waits() -> None:
    tokenizer = gemma_like()
    ids = [tokenizer.require_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "😀"]
    detokenizer.push(ids[0])
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_only_the_first_space_is_left_out() -> None:
    tokenizer = llama_like()
    assert "".join(streamed(tokenizer, tokenizer.encode("the picture"))) == "the picture"
    ids = tokenizer.encode(" the")
    assert "".join(streamed(tokenizer, ids)) == " the"


def test_special_tokens_show_when_asked() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("<think>a<|im_end|>")
    assert Detokenizer(tokenizer).extend(ids) == "a"
    assert Detokenizer(tokenizer, skip_special_tokens=False).extend(ids) == "<think>a<|im_end|>"
    keep = {tokenizer.require_id("<think>")}
    assert Detokenizer(tokenizer, keep=keep).extend(ids) == "<think>a"


def test_ids_beyond_the_vocabulary_are_nothing() -> None:
    assert Detokenizer(byte_level()).push(10**6) == ""


def test_each_kind_has_its_rules() -> None:
    names = {
        kind: getattr(made := assembler_for(make().backend), "func", made)
        for kind, make in KINDS.items()
    }
    assert names == {
        "byte_level": detokenize.ByteLevelAssembler,
        "llama_like": detokenize.ByteFallbackAssembler,
        "gemma_like": detokenize.ByteFallbackAssembler,
        "metaspace": detokenize.MetaspaceAssembler,
        "word_pieces": WindowAssembler,
        "no_decoder": WindowAssembler,
    }


def test_the_general_rule_works_in_bounded_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    tokenizer = byte_level()

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    assembler = WindowAssembler(Counting())
    byte = tokenizer.encode("😀")[0]
    for _ in range(100):
        assembler.push(byte, "")
    assert longest <= 24
    window = WindowAssembler(tokenizer.backend)
    text = "Naïve 图片 😀👍 x"
    ids = tokenizer.encode(text)
    pieces = [*(window.push(token_id, "") for token_id in ids), window.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
