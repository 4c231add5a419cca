"""The training code: packed forward equals Transformers, pictures and labels agree."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from training.bundled import checkpoint, engine, feed, fonts, packing, scoring, tasks
from training.bundled.forward import Packed, gather_patches
from training.bundled.page import smart_resize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples() -> list:
    """One sample of each kind, drawn with whatever training fonts this machine has."""
    if len(fonts.faces("train")) < 2:
        pytest.skip("no TrueType fonts on this machine: only Pillow's own is there")
    rng = Random(3)
    return [make(rng, "train") for make in tasks.MAKERS.values()]


def test_packed_forward_equals_transformers(samples: list) -> None:
    torch.manual_seed(0)
    tokenizer = checkpoint.build_tokenizer()
    model = checkpoint.build_model(tokenizer).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.03)
    packed = Packed(model)
    encoder = packing.Encoder(tokenizer)
    chosen = [samples[0], samples[2], samples[8], samples[6]]
    packs = [packing.pack(chosen[:2], encoder), packing.pack(chosen[2:], encoder)]
    batch = feed.join([feed.hold(arrays, CPU) for arrays in packs])
    with torch.no_grad():
        states, _ = packed(batch)
        logits = states @ model.model.language_model.embed_tokens.weight.T
    flat = gather_patches(batch.pixels, batch.images, batch.tables, batch.patches).float()
    values = flat.view(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536)
    grids = torch.cat([torch.ones(len(batch.images), 1), batch.images[:, 4:6]], dim=1).long()
    edges = batch.text_spans[0].tolist()
    image = patch = 0
    for sample, start, end in zip(chosen, edges[:-1], edges[1:], strict=True):
        shapes = grids[image : image + len(sample.pictures)]
        count = int(shapes.prod(1).sum())
        ids = batch.ids[None, start:end]
        with torch.no_grad():
            expected = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == packed.image_token).int(),
                pixel_values=values[patch : patch + count],
                image_grid_thw=shapes,
            ).logits[0]
        image, patch = image + len(shapes), patch + count
        torch.testing.assert_close(logits[start:end], expected, atol=1e-4, rtol=1e-4)


def test_pictures_keep_their_pixels_on_the_way_to_the_model(samples: list) -> None:
    """The fast path (one plane, coloured last) and the real preprocessing agree."""
    encoder = packing.Encoder(checkpoint.build_tokenizer())
    for sample in samples:
        if not sample.pictures:
            continue
        held = feed.hold(packing.pack([sample], encoder), CPU)
        batch = feed.join([held])
        fast = gather_patches(batch.pixels, batch.images, batch.tables, batch.patches).float()
        slow = torch.cat([engine.preprocess(picture.image())[0] for picture in sample.pictures])
        slow = slow.view(len(slow), 3, 2, 256)[:, :, 0].reshape(len(slow), -1)
        assert (fast - slow).abs().mean() < 0.01
        assert (fast - slow).abs().quantile(0.999) < 0.1


def test_smart_resize_is_the_processors() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        smart_resize as reference,
    )

    from training.bundled.page import MAX_PIXELS, MIN_PIXELS

    rng = Random(0)
    for _ in range(300):
        high, wide = rng.randint(8, 1500), rng.randint(8, 1500)
        expected = reference(high, wide, factor=32, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
        assert smart_resize(high, wide) == expected


@pytest.mark.parametrize(
    "text",
    ["| a | b |\n| --- | --- |\n| x  y | $3.20 |", "日本 é\t\r\n  x", "How many red circles?", ""],
)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = checkpoint.build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_no_word_is_in_both_splits() -> None:
    from training.bundled import words

    assert not set(words.lexicon("train")) & set(words.lexicon("heldout"))


def test_no_font_family_is_in_both_splits() -> None:
    for family, paths in fonts.scan(fonts.font_directory()).items():
        inside = {str(path) for path in paths} & set(fonts.faces("train"))
        assert not (inside and fonts.held_out_family(family))


def test_scores() -> None:
    truth = '```json\n[\n\t{"bbox_2d": [0, 0, 100, 100], "label": "a"}\n]\n```'
    half = truth.replace("100, 100", "100, 50")
    assert scoring.box_score(truth, truth) == 1.0
    assert scoring.box_score(half, truth) == 0.5
    assert scoring.box_score("nothing", truth) == 0.0
    assert scoring.edit_distance("kitten", "sitting") == 3
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert scoring.table_score(table, table) == (4, 4)
    assert scoring.table_score(table.replace("2", "3"), table) == (3, 4)


def test_cells_name_the_characters_where_they_stand(samples: list) -> None:
    picture = samples[0].pictures[0]
    rows, columns = smart_resize(picture.size[1], picture.size[0])
    cells = picture.cells()
    assert cells.shape == (rows * columns // 1024, 8)
    assert np.count_nonzero(cells) <= len(picture.glyph_code)
    assert np.count_nonzero(cells) >= 0.9 * len(picture.glyph_code)
    assert isinstance(picture.image(), Image.Image)
