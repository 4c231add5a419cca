"""The made-up vocabulary of the serving benchmark counts a text as llama.cpp's form of it does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from opsin.prompt.template import ChatTemplate
from opsin.prompt.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
VOCABULARY = runpy.run_path(str(ROOT / "bench/vocabulary.py"))
SIZES = {"idefics3": 49280, "qwen3_vl": 151936}


@pytest.mark.parametrize("model_type", SIZES)
def test_a_byte_is_a_token_and_has_the_number_of_the_list(model_type: str, tmp_path: Path) -> None:
    size = SIZES[model_type]
    VOCABULARY["write_tokenizer"](tmp_path, model_type, size)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "Tell a story of an island, \u00e9t\u00e9.\n\nNow"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) - 1  # two line breaks are one
    assert tokenizer.decode(ids) == text
    words = VOCABULARY["words"](model_type, size)
    assert [tokenizer.id_to_token(i) for i in (0, 256, 300, size - 1)] == [
        words[i] for i in (0, 256, 300, size - 1)
    ]
    for number, word in VOCABULARY["SPECIAL"][model_type].items():
        assert tokenizer.encode(word) == [number]
    assert len(set(words)) == size


def test_the_template_takes_text_and_parts(tmp_path: Path) -> None:
    VOCABULARY["write_tokenizer"](tmp_path, "idefics3", SIZES["idefics3"])
    template = ChatTemplate.from_folder(tmp_path)
    parts = [{"type": "text", "text": "Hello"}]
    for content in ("Hello", parts):
        rendered = template.render([{"role": "user", "content": content}])
        assert rendered == "user: Hello\nassistant: "
