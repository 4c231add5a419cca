"""What is particular to Phi-3.5-vision: a table stored under two names, and numbered pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import opsin
from opsin.errors import InputError

from .checkpoints import write_checkpoint
from .ours import Ours
from .pictures import picture
from .scenes import scenes
from .zoo import phi3v

CASE = phi3v.CASES[0]
TABLE, SHARED = "model.embed_tokens.weight", "model.vision_embed_tokens.wte.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the table under its own name alone."""
    return write_checkpoint(CASE, tmp_path_factory.mktemp("phi3v"))


@pytest.mark.parametrize("kept", [(SHARED,), (TABLE, SHARED)], ids=["theirs", "both"])
def test_the_table_may_be_stored_with_the_tower(folder: Path, kept: tuple[str, ...]) -> None:
    (scene,) = (scene for scene in scenes(CASE) if scene.name == "one")
    ours = Ours(CASE, folder)
    expected = ours.logits(ours.prompt(scene))
    path = folder / "model.safetensors"
    stored = load_file(path)
    table = next(stored.pop(name) for name in (TABLE, SHARED) if name in stored)
    stored.pop(SHARED, None)
    try:
        save_file({**stored, **{name: table.clone() for name in kept}}, path)
        again = Ours(CASE, folder)
        assert (again.logits(again.prompt(scene)) == expected).all()
    finally:
        save_file({**stored, TABLE: table}, path)


def test_pictures_are_numbered_in_order(folder: Path) -> None:
    _, processor = opsin.load(folder, device="cpu")
    pictures = [picture(1, 60, 40), picture(2, 40, 60)]
    text = "<|user|>\n<|image_{}|>and<|image_{}|>\nCompare.<|end|>\n<|assistant|>\n"
    prompt = processor.prepare(text.format(1, 2), images=pictures)
    assert [item.size for item in prompt.media] == [(60, 40), (40, 60)]
    with pytest.raises(InputError, match="numbered in order"):
        processor.prepare(text.format(2, 1), images=pictures)
    with pytest.raises(InputError):
        processor.prepare(text.format(1, 2), images=pictures[:1])


def test_each_piece_of_text_begins_as_a_text_does(folder: Path) -> None:
    _, processor = opsin.load(folder, device="cpu")
    start = processor.tokenizer.token_to_id("<s>")
    pictures = [picture(1, 60, 40), picture(2, 40, 60)]
    text = "<|user|>\n<|image_1|><|image_2|>\nCompare.<|end|>\n<|assistant|>\n"
    prompt = processor.prepare(text, images=pictures)
    first, second = (item.indices.tolist() for item in prompt.media)
    ids = prompt.token_ids
    assert ids[0] == start
    assert ids[first[-1] + 1 : second[0]] == [start], "nothing stands between them"
    assert ids[second[-1] + 1] == start
    assert ids.count(start) == 3
