"""DeepSeek-OCR beyond the generic runner: modes, tasks, places, its conversation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opsin import families, grounding
from opsin.errors import InputError
from opsin.families.base import Family
from opsin.prompt.tasks import task_messages

from .conftest import Lab
from .ours import Ours, relative_error
from .pictures import picture
from .zoo import deepseek, deepseekocr

OCR2 = next(case for case in deepseek.CASES if case.name == "deepseek_ocr2-published")
# Rows of so many tokens with their ends, and a separator, by mode.
MODES = (
    ((700, 300), {"base_size": 512, "image_size": 512, "cropping": False}, 8 * 9 + 1),
    ((700, 300), {"base_size": 640, "image_size": 640, "cropping": False}, 10 * 11 + 1),
    ((1600, 2300), {"cropping": False}, 273),
    ((700, 300), {"base_size": 1280, "cropping": False}, 20 * 21 + 1),
    ((640, 480), {}, 273),
    ((1200, 600), {}, 273 + 10 * 21),
    ((1200, 600), {"max_patches": 1}, 273),
    ((3000, 1000), {"max_patches": 3}, 273 + 10 * 31),
)


@pytest.fixture
def base(labs: Callable[..., Lab]) -> Lab:
    """The first checkpoint."""
    return labs(deepseekocr.CASES[0])


def published() -> Family:
    """The family with the sizes that its authors leave to their code."""
    return families.load(dict(deepseekocr.CASES[0].config), {})


@pytest.mark.parametrize(("size", "options", "tokens"), MODES)
def test_a_picture_costs_what_its_mode_does(
    size: tuple[int, int], options: dict[str, Any], tokens: int
) -> None:
    ready = published().prepare_image(Image.new("RGB", size), options)
    assert ready.num_tokens == tokens
    assert ready.text.count("<image>") == tokens


@pytest.mark.parametrize("name", ["base_size", "image_size"])
def test_a_side_must_make_whole_tokens(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} cannot be 500"):
        published().prepare_image(picture(1, 90, 70), {name: 500})


def test_requests_of_several_modes_are_read_together(base: Lab) -> None:
    family, towers = base.ours.model.family, base.ours.model.towers
    modes = ({"base_size": 256, "image_size": 128}, {"base_size": 128, "cropping": False})
    items = [family.prepare_image(picture(14, 200, 130), modes[i % 2]) for i in range(3)]
    with torch.inference_mode():
        alone = [family.encode(towers, [item])[0].embeds for item in items]
        together = [encoded.embeds for encoded in family.encode(towers, items)]
    for item, one, same in zip(items, alone, together, strict=True):
        assert one.shape[0] == item.num_tokens
        torch.testing.assert_close(same, one, rtol=1e-4, atol=1e-5)


def test_a_task_asks_in_the_authors_words(base: Lab) -> None:
    processor = base.ours.processor
    for task, words, asked in (
        ("markdown", "", "<|grounding|>Convert the document to markdown."),
        ("locate", "cat", "Locate <|ref|>cat<|/ref|> in the image."),
    ):
        messages = task_messages(processor.family, task, words)
        prompt = processor.prepare(
            messages, images=[picture(1, 90, 70)], options={"base_size": 128, "image_size": 128}
        )
        text = processor.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        bos = processor.tokenizer.decode([prompt.token_ids[0]], skip_special_tokens=False)
        assert text == f"{bos}{'<image>' * 7}\n{asked}"


@pytest.mark.parametrize("case", [deepseekocr.CASES[0], OCR2], ids=str)
def test_places_count_a_side_as_999(case: Any, labs: Callable[..., Lab]) -> None:
    processor = labs(case).ours.processor
    answer = "<|ref|>title<|/ref|><|det|>[[0, 111, 999, 222]]<|/det|>\n# Opsin\n"
    (region,) = grounding.parse(answer, processor, (999, 333))
    assert (region.label, region.text.strip()) == ("title", "# Opsin")
    assert region.bounds == pytest.approx((0, 37, 999, 74))


@pytest.mark.parametrize("case", [deepseekocr.CASES[0], OCR2], ids=str)
def test_tables_may_repeat_themselves(case: Any) -> None:
    family = families.load(dict(case.config), {})
    assert family.no_repeat_ngram is not None
    assert family.no_repeat_ngram[1:] == (90, ("<td>", "</td>"))


def as_mlx_has_it(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as mlx-vlm converts them: other prefixes, channels last, experts together."""
    made: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in weights.items():
        name = re.sub(r"^model\.(?=layers|embed_tokens|norm)", "language_model.model.", name)
        name = re.sub(r"^model\.|^(?=lm_head)", lambda m: "" if m[0] else "language_model.", name)
        name = name.replace("view_seperator", "view_separator")
        if value.ndim == 4 and "pos_embed" not in name:
            value = value.permute(0, 2, 3, 1)
        found = re.match(r"(.*)\.experts\.(\d+)\.(.*)", name)
        if found:
            experts.setdefault(f"{found[1]}.switch_mlp.{found[3]}", {})[int(found[2])] = value
        else:
            made[name] = value.contiguous()
    for name, parts in experts.items():
        made[name] = torch.stack([parts[i] for i in range(len(parts))])
    return made


def test_a_converted_checkpoint_answers_the_same(base: Lab, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path, dirs_exist_ok=True)
    weights = as_mlx_has_it(load_file(tmp_path / "model.safetensors"))
    assert "language_model.model.layers.1.mlp.switch_mlp.up_proj.weight" in weights
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    scene = base.scenes["large"]
    same = Ours(base.case, tmp_path).logits(base.ours.prompt(scene))
    assert relative_error(same, base.ours.logits(base.ours.prompt(scene))) < 1e-6
