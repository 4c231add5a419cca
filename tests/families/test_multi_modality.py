"""DeepSeek-VL and Janus in their authors' layout answer as in Transformers', with equal weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .checkpoints import Case
from .conftest import Lab
from .ours import Ours, relative_error
from .zoo import CASES

LOW = "vision_model.vision_tower_low.vision_tower."
HIGH = "vision_model.vision_tower_high.vision_tower."
SIGLIP = (
    (r"^SIGLIP\.embeddings\.position_embedding\.weight$", "SIGLIP.pos_embed"),
    (r"^SIGLIP\.embeddings\.patch_embedding\.", "SIGLIP.patch_embed.proj."),
    (r"^SIGLIP\.post_layernorm\.", "SIGLIP.norm."),
    (r"^SIGLIP\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"SIGLIP.blocks.\1.norm\2."),
    (r"^SIGLIP\.encoder\.layers\.(\d+)\.self_attn\.\w*proj\w*\.", r"SIGLIP.blocks.\1.attn.proj."),
    (r"^SIGLIP\.encoder\.layers\.", "SIGLIP.blocks."),
)
NAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "language_model.model."),
    (r"^(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"^(?:model\.)?aligner\.(?:linear1|fc1)\.", "aligner.layers.0."),
    (r"^(?:model\.)?aligner\.(?:linear2|hidden_layers\.0)\.", "aligner.layers.2."),
    (r"^(?:model\.)?aligner\.proj\.", "aligner.layers.1."),
    (r"^(?:model\.)?aligner\.vision_proj\.", "aligner.low_up_proj."),
    (r"^(?:model\.)?aligner\.high_res_vision_proj\.", "aligner.high_up_proj."),
    (r"^(?:model\.)?vqmodel\.", "gen_vision_model."),
    (r"^(?:model\.)?generation_aligner\.", "gen_aligner."),
    (r"^(?:model\.)?generation_head\.", "gen_head."),
    (r"^(?:model\.)?generation_embeddings\.", "gen_embed."),
    (r"^(?:model\.)?high_res_vision_model\.vision_encoder\.", HIGH),
    (r"^(?:model\.)?high_res_vision_neck\.conv1\.", HIGH + "neck_hd.0."),
    (r"^(?:model\.)?high_res_vision_neck\.layer_norm1\.", HIGH + "neck_hd.1."),
    (r"^(?:model\.)?high_res_vision_neck\.conv2\.", HIGH + "neck_hd.2."),
    (r"^(?:model\.)?high_res_vision_neck\.layer_norm2\.", HIGH + "neck_hd.3."),
    (r"^(?:model\.)?high_res_vision_proj\.conv1\.", HIGH + "downsamples.0."),
    (r"^(?:model\.)?high_res_vision_proj\.conv2\.", HIGH + "downsamples.1."),
    (r"^(?:model\.)?high_res_vision_alpha$", HIGH + "hd_alpha_downsamples"),
    (r"(vision_tower\.)layers\.(\d+)\.layer_norm(\d)\.", r"\1blocks.\2.norm\3."),
    (r"(vision_tower\.)layers\.", r"\1blocks."),
    (r"(vision_tower\.patch_embed\.proj)ection\.", r"\1."),
    (r"(vision_tower\.neck\.)conv1\.", r"\g<1>0."),
    (r"(vision_tower\.neck\.)layer_norm1\.", r"\g<1>1."),
    (r"(vision_tower\.neck\.)conv2\.", r"\g<1>2."),
    (r"(vision_tower\.neck\.)layer_norm2\.", r"\g<1>3."),
    (r"^(?:model\.)?vision_model\.(?:vision_model\.)?(?!vision_tower)", "SIGLIP."),
)


def authors_names(weights: dict[str, torch.Tensor], siglip: str) -> dict[str, torch.Tensor]:
    """Transformers' weights as the authors store them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        first = re.match(r"(.*vision_model\..*\.self_attn)\.q_proj\.(\w+)$", name)
        if re.search(r"vision_model\..*\.self_attn\.[kv]_proj\.", name):
            continue
        if first:
            parts = [weights[f"{first[1]}.{part}_proj.{first[2]}"] for part in "qkv"]
            name, tensor = f"{first[1]}.fused.{first[2]}", torch.cat(parts)
        for pattern, replacement in (*NAMES, *SIGLIP):
            name = re.sub(pattern, replacement, name)
        name = name.replace(".self_attn.fused.", ".attn.qkv.").replace("SIGLIP.", siglip)
        found[name] = tensor[None] if name.endswith("pos_embed") and tensor.ndim == 2 else tensor
    # The pooling head, and norms of the hybrid that its features do not pass.
    found[siglip + "attn_pool.latent"] = torch.zeros(1, 1, 32)
    if siglip == LOW:
        found["vision_model.high_layer_norm.weight"] = torch.zeros(4)
    return found


def authors_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config of Transformers' in the authors' keys."""
    vision = config["vision_config"]
    low = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_ratio": vision.get("mlp_ratio") or vision["intermediate_size"] / vision["hidden_size"],
    }
    high = config.get("high_res_vision_config")
    tower = {"cls": "CLIPVisionTower", "params": low}
    if high is not None:
        parts = {"low_res_cfg": low, "high_res_cfg": {**high, "model_name": "sam_b_downsample"}}
        tower = {"cls": "HybridVisionTower", "params": {"concat_type": "tuple", **parts}}
    drawing = {"gen_vision_config": {"cls": "VQ-16"}} if "vq_config" in config else {}
    return {
        "model_type": "multi_modality",
        "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2}},
        "language_config": config["text_config"],
        "vision_config": {**tower, "model_type": "vision"},
        **drawing,
    }


FAMILIES = ("deepseek_vl", "deepseek_vl_hybrid", "janus")


@pytest.fixture(
    params=[c for c in CASES if c.family in FAMILIES and c.variant == "untied"], ids=str
)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """The lab of each of the three."""
    return labs(request.param)


@pytest.fixture
def authors(lab: Lab, tmp_path: Path) -> Ours:
    """The same weights in the authors' layout, which has no chat template."""
    folder = tmp_path / "authors"
    shutil.copytree(lab.folder, folder)
    for path in (*folder.glob("chat_template*"), folder / "model.safetensors"):
        path.unlink()
    siglip = LOW if "high_res_vision_config" in lab.case.config else "vision_model.vision_tower."
    weights = authors_names(load_file(lab.folder / "model.safetensors"), siglip)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(authors_config(dict(lab.case.config))))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Ours(lab.case, folder)


def test_the_authors_layout_computes_the_same(lab: Lab, authors: Ours, tmp_path: Path) -> None:
    folder = tmp_path / "transformers"
    shutil.copytree(lab.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"  # the authors' SigLIP has the exact one
    (folder / "config.json").write_text(json.dumps(config))
    prompt = lab.ours.prompt(lab.scenes["three"])
    expected = Ours(lab.case, folder).logits(prompt)
    assert relative_error(authors.logits(prompt), expected) < 1e-5


def test_the_bundled_template_says_the_same(lab: Lab, authors: Ours) -> None:
    for name, scene in lab.scenes.items():
        expected = lab.reference_inputs(name)["input_ids"][0].tolist()
        assert authors.prompt(scene).token_ids == expected, name
