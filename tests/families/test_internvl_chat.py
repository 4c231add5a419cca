"""InternVL in the authors' layout answers as in Transformers' layout, with the same weights."""

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

from opsin.engine.model import load_model

from .checkpoints import Case
from .conftest import Lab
from .ours import Ours, relative_error
from .pictures import picture
from .scenes import one_image
from .zoo import CASES

NAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "language_model.model."),
    (r"^(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"^(?:model\.)?multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "mlp1.3."),
    (
        r"^(?:model\.)?vision_tower\.embeddings\.cls_token$",
        "vision_model.embeddings.class_embedding",
    ),
    (
        r"^(?:model\.)?vision_tower\.embeddings\.position_embeddings$",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"^(?:model\.)?vision_tower\.embeddings\.patch_embeddings\.projection\.",
        "vision_model.embeddings.patch_embedding.",
    ),
    (r"^(?:model\.)?vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.lambda_1$", ".ls1"),
    (r"\.lambda_2$", ".ls2"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
)
TEXT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def repacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformers' weights under the authors' names, queries, keys and values in one matrix."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        new = name
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        found[new] = tensor
    for name in [name for name in found if ".attn.q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return found


def chat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same model's config in the authors' keys."""
    vision = config["vision_config"]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config["downsample_ratio"],
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"][0],
        "llm_config": {**config["text_config"], "tie_word_embeddings": False},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "hidden_size": vision["hidden_size"],
            "image_size": vision["image_size"][0],
            "intermediate_size": vision["intermediate_size"],
            "layer_norm_eps": 1e-6,
            "norm_type": vision["norm_type"],
            "num_attention_heads": vision["num_attention_heads"],
            "num_channels": 3,
            "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": vision["patch_size"][0],
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
        },
    }


@pytest.fixture
def both(labs: Callable[[Case], Lab], tmp_path: Path) -> tuple[Lab, Ours]:
    """The lab of Transformers' layout, and our model of the authors' layout."""
    case = next(case for case in CASES if case.name == "internvl-small")
    lab = labs(case)
    folder = tmp_path / "chat"
    shutil.copytree(lab.folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(repacked(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(chat_config(dict(case.config))))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_text(TEXT_TEMPLATE)
    return lab, Ours(case, folder)


def test_the_authors_layout_gives_the_reference_s_logits(both: tuple[Lab, Ours]) -> None:
    lab, chat = both
    for name in ("text", "one", "three"):
        prompt = chat.prompt(lab.scenes[name])
        assert prompt.token_ids == lab.reference_inputs(name)["input_ids"][0].tolist(), name
        assert relative_error(chat.logits(prompt), lab.reference_logits(name)) < 1e-4, name


def test_a_template_of_the_text_model_is_replaced(both: tuple[Lab, Ours]) -> None:
    _, chat = both
    prompt = chat.prepare(one_image("wide", picture(3, 120, 40)))
    assert prompt.text.startswith("<|im_start|>user\n<img><IMG_CONTEXT>")


def test_both_layouts_have_the_same_parameters(both: tuple[Lab, Ours]) -> None:
    lab, chat = both
    expected = load_model(lab.folder).state_dict()
    got = chat.model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
