"""jina-vlm beyond the generic runner: published sizes, MLX's names and codes, black pictures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opsin import families
from opsin.decoder.native import why_not
from opsin.engine import model as loading
from opsin.errors import CheckpointError, InputError

from ..quant.test_mlx import write_both
from .conftest import Lab
from .ours import Ours, relative_error
from .pictures import picture
from .scenes import one_image
from .zoo import jina_vlm

CASE = jina_vlm.CASES[0]
MLX_NAMES = (
    (r"^model\.vision_model\.vl_connector\.", "vl_connector."),
    (r"^model\.", ""),
    (r"_lnorm\.", "_norm."),
    (r"(qkv|\.q|kv)_w\.", r"\1."),
    (r"^(language_model.*\.ffn|vl_connector\.projector)\.up\.", r"\1.gate_up."),
    (r"^lm_head\.", "language_model.lm_head."),
)


@pytest.fixture
def base(labs: Callable[..., Lab]) -> Lab:
    """The checkpoint that is laid out as the published one."""
    return labs(CASE)


def published() -> dict:
    """The published sizes in the zoo's config."""
    norm = {"bias": False, "eps": 1e-6, "type": "rms", "with_affine": True}
    attention = jina_vlm._attention(16, 8, 128, norm, **dict.fromkeys(
        ("q_lnorm", "k_lnorm", "qkv_lnorm_on_heads"), True
    ))  # fmt: skip
    text = jina_vlm._text(attention)
    text |= {"hidden_size": 2048, "n_layers": 28, "embedding_size": 151936, "vocab_size": 151936}
    text["block_config"]["ffn_config"]["size"] = 6144
    vision = jina_vlm._vision(378, 14, [-4, -10])
    vision |= {"hidden_size": 1152, "n_layers": 27, "output_size": 2048}
    vision["block_config"]["attn_config"] |= {"n_heads": 16, "head_dim": 72}
    vision["block_config"]["ffn_config"]["size"] = 4304
    return {"model_type": "jvlm", "text_config": text, "vision_config": vision}


SETTINGS = {
    "antialias": False,
    "cropping_method": "overlap-and-resize",
    "interpolation": "bilinear",
    "max_crops": 12,
    "max_pixels": 1003520,
    "min_pixels": 3136,
    "normalization_method": "minmax",
    "overlap_margins": [4, 4],
    "resize_in_float32": False,
}


def test_published_sizes() -> None:
    family = families.load(published(), SETTINGS)
    small = family.prepare_image(picture(1, 64, 64), {})
    # 14 x 14 of the whole and of the one crop.
    assert (small.num_tokens, small.details["grid"]) == (392, (1, 1))
    item = family.prepare_image(picture(1, 640, 480), {})
    assert item.features["pixel_values"].shape[1:] == (729, 588)
    assert item.details["grid"] == (2, 2)
    assert item.num_tokens == 14 * 14 + 24 * 24
    assert item.text.count("<im_patch>") == item.num_tokens
    assert item.text.count("<im_col>") == 14 + 24
    one = family.prepare_image(picture(1, 640, 480), {"max_crops": 1})
    assert one.details["grid"] == (1, 1)
    with pytest.raises(InputError, match="max_crops"):
        family.prepare_image(picture(1, 640, 480), {"max_crops": 0})
    decoder = family.decoder()
    assert decoder.extra_embeddings == 128
    assert why_not(decoder) == ""


def test_parts_that_are_not_built_are_refused_by_name() -> None:
    config = published()
    config["vision_config"]["vl_connector_config"]["pooling_type"] = "stack"
    with pytest.raises(CheckpointError, match="pooling_type"):
        families.load(config, SETTINGS)
    with pytest.raises(CheckpointError, match="overlap_margins, interpolation"):
        families.load(published(), {"overlap_margins": [3, 3], "interpolation": "lanczos"})


def as_mlx_has_it(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of Jina AI's conversion, with biases in one piece, and none in the text's layers.

    The text's biases are zeros in the published weights.
    """
    named = {}
    for name, value in weights.items():
        if name.endswith(("k_b", "v_b", "q_b")):
            continue
        for pattern, new in MLX_NAMES:
            name = re.sub(pattern, new, name)
        named[name] = value
    for name in (name for name in weights if name.endswith("q_b") and "language" not in name):
        q, k, v = (weights[name[:-3] + part] for part in ("q_b", "k_b", "v_b"))
        if "pooling" in name:
            biases = {"pooling.q": q, "pooling.kv": torch.cat((k, v))}
        else:
            biases = {"attn.qkv": torch.cat((q, k, v))}
        for layer, bias in biases.items():
            place = name.replace("model.", "", 1).rpartition(".")[0].rpartition(".")[0]
            place = place.replace("vision_model.vl_connector", "vl_connector")
            named[f"{place}.{layer}.bias"] = bias
    return named


def test_the_names_and_codes_of_mlx_are_read(
    base: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that come last are cut out of codes too."""
    first, second = tmp_path / "authors", tmp_path / "mlx"
    for folder in (first, second):
        shutil.copytree(base.folder, folder)
    weights = load_file(base.folder / "model.safetensors")
    for name in weights:
        if "language_model" in name and name.endswith("_b"):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, first / "model.safetensors")
    save_file(as_mlx_has_it(weights), second / "model.safetensors")
    prompt = base.ours.prompt(base.scenes["one"])
    named = Ours(CASE, second)
    expected = Ours(CASE, first).logits(prompt)
    assert not named.model.decoder.config.layers[0].attention.qkv_bias
    assert relative_error(named.logits(prompt), expected) < 1e-5
    coded, whole = write_both(second, tmp_path, 4)
    monkeypatch.setattr(loading, "native_library", lambda: None)
    got, wanted = (Ours(CASE, folder, dtype="float32").logits(prompt) for folder in (coded, whole))
    assert relative_error(got, wanted) < 1e-4


def test_a_black_picture_is_one_without_features(base: Lab) -> None:
    """The reference takes a crop whose every value is the lowest for padding."""
    for name, image in (
        ("black", Image.new("RGB", (150, 90))),
        ("half", Image.new("RGB", (190, 190))),
    ):
        if name == "half":
            image.paste((200, 10, 30), (0, 0, 95, 190))
        scene = one_image(name, image)
        theirs = base.reference.logits(base.encode(scene))
        ours = base.ours.logits(base.ours.prepare(scene))
        assert relative_error(ours[:, : theirs.shape[1]], theirs) < 1e-4, name


def test_the_template_sees_the_authors_variables(base: Lab, labs: Callable[..., Lab]) -> None:
    spaced, plain = (
        lab.ours.prompt(lab.scenes["text"]).text for lab in (base, labs(jina_vlm.CASES[1]))
    )
    assert spaced == "<|endoftext|> User: What do you see? Assistant:"
    assert plain == "<|endoftext|>User: What do you see? Assistant:"
