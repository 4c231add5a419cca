"""Molmo beyond the generic runner: what published configs leave out, MLX's names, places."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from opsin import families
from opsin.decoder.native import why_not
from opsin.engine import model as loading
from opsin.errors import InputError
from opsin.grounding import Point, parse

from ..quant.test_mlx import write_both
from .conftest import Lab
from .ours import Ours, relative_error
from .pictures import picture
from .zoo import molmo


@pytest.fixture
def base(labs: Callable[..., Lab]) -> Lab:
    """The checkpoint upon Qwen 2."""
    return labs(molmo.CASES[0])


def test_the_published_config_leaves_the_tower_to_the_code() -> None:
    config = {
        "model_type": "molmo",
        "embedding_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 37888,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
        "qkv_bias": True,
    }
    family = families.load(config, {})
    item = family.prepare_image(picture(1, 640, 480), {})
    # 12 x 12 of the whole, and of the crops 8 x 8 each and what the borders have more.
    assert item.features["pixel_values"].shape[1:] == (576, 588)
    rows, columns = item.details["grid"]
    assert item.num_tokens == 144 + (8 * rows + 4) * (8 * columns + 4)
    assert item.text.count("<im_patch>") == item.num_tokens
    decoder = family.decoder()
    assert decoder.extra_embeddings == 128
    assert why_not(decoder) == ""


def test_the_names_of_mlx_are_read(base: Lab, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path, dirs_exist_ok=True)
    weights = {
        name.replace("model.transformer", "language_model.model").replace(
            "model.vision_backbone", "vision_tower"
        ): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    prompt = base.ours.prompt(base.scenes["one"])
    again = Ours(base.case, tmp_path).logits(prompt)
    assert relative_error(again, base.ours.logits(prompt)) < 1e-6


def test_the_codes_of_mlx_are_read(
    base: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that come last are cut out of codes too."""
    coded, whole = write_both(base.folder, tmp_path, 4)
    monkeypatch.setattr(loading, "native_library", lambda: None)
    prompt = base.ours.prompt(base.scenes["one"])
    got, wanted = (
        Ours(base.case, folder, dtype="float32").logits(prompt) for folder in (coded, whole)
    )
    assert relative_error(got, wanted) < 1e-4


def test_points_are_shares_of_the_picture(base: Lab) -> None:
    answer = 'There: <point x="10.5" y="20.0" alt="the cat">the cat</point>'
    (region,) = parse(answer, base.ours.processor, (200, 100))
    assert isinstance(region, Point)
    assert (region.x, region.y) == pytest.approx((21, 20))


def test_two_pictures_are_refused(base: Lab) -> None:
    with pytest.raises(InputError, match="one picture at a time"):
        base.ours.processor.prepare("Compare.", images=[picture(1, 90, 70), picture(2, 90, 70)])
