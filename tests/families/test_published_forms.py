"""Configs as the authors publish them, where Transformers' classes take only their own form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from opsin import families
from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import GroupedMoEConfig, MLPConfig, MoEConfig
from opsin.families.base import Family

# The query budgets that DeepSeek documents: 256 and a separator, and 144 a tile.
BUDGETS = (
    ((700, 300), {}, 257),
    ((1600, 2300), {"cropping": False}, 257),
    ((1600, 1500), {"max_patches": 1}, 401),
    ((3000, 1000), {"max_patches": 3}, 689),
    ((1600, 2300), {}, 1121),
    ((1600, 2300), {"cropping": True, "max_patches": 6}, 1121),
)


def deepseek_ocr2() -> Family:
    text = {
        "first_k_dense_replace": 1,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "kv_lora_rank": None,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 896,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 10,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "topk_group": 1,
        "topk_method": "greedy",
        "vocab_size": 129280,
    }
    sam = {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": [2, 5, 8, 11]}
    config = {
        "architectures": ["DeepseekOCR2ForCausalLM"],
        "language_config": text,
        "model_type": "deepseek_vl_v2",
        "projector_config": {"input_dim": 896, "n_embed": 1280, "projector_type": "linear"},
        "vision_config": {"width": {"sam_vit_b": sam, "qwen2-0-5b": {"dim": 896}}},
    }
    return families.load(config, {})


@pytest.mark.parametrize(("size", "options", "tokens"), BUDGETS)
def test_a_picture_costs_the_documented_tokens(
    size: tuple[int, int], options: dict[str, object], tokens: int
) -> None:
    ready = deepseek_ocr2().prepare_image(Image.new("RGB", size), options)
    assert ready.num_tokens == tokens
    assert ready.text.count("<image>") == tokens
    assert ready.features["pixel_values"].shape == (3, 1024, 1024)
    assert len(ready.features["pixel_values_local"]) == (tokens - 257) // 144


def test_the_first_layers_of_deepseek_are_dense() -> None:
    layers = deepseek_ocr2().decoder().layers
    assert layers[0].mlp == MLPConfig(6848)
    assert all(isinstance(layer.mlp, MoEConfig) for layer in layers[1:])
    assert layers[1].mlp.shared == MLPConfig(1792)


def test_a_flat_ernie_config_reads_as_the_nested_one() -> None:
    shape = {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": [1536, 512],
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
        "vocab_size": 103424,
    }
    tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "patch_size": 14}
    tower |= {"hidden_act": "quick_gelu", "in_channels": 3, "spatial_merge_size": 2}
    flat = {
        **shape,
        "im_patch_id": 100295,
        "model_type": "ernie4_5_moe_vl",
        "moe_layer_end_index": [29, 28],
        "moe_layer_interval": 1,
        "moe_layer_start_index": [1, 1],
        "moe_num_experts": [64, 64],
        "rope_theta": 500000.0,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "tie_word_embeddings": True,
        "vision_config": {**tower, "mlp_ratio": 4},
    }
    nested = {
        "image_token_id": 100295,
        "model_type": "ernie4_5_vl_moe",
        "text_config": {
            **shape,
            "mlp_layer_types": ["dense"] + ["sparse"] * 27,
            "moe_num_experts": 64,
            "rope_parameters": {"rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
        },
        "vision_config": {**tower, "intermediate_size": 5120, "temporal_merge_size": 2},
    }
    published, converted = families.load(flat, {}), families.load(nested, {})
    decoder = published.decoder()
    assert [isinstance(layer.mlp, GroupedMoEConfig) for layer in decoder.layers].count(True) == 27
    theirs = converted.decoder()
    assert decoder.layers[1].mlp == theirs.layers[1].mlp
    assert decoder.layers[1].attention.heads == theirs.layers[1].attention.heads
    assert decoder.layers[1].attention.rope.axes == theirs.layers[1].attention.rope.axes
    groups = published.expert_groups([5, 101304, 100295, 100295, 101305, 7])
    assert groups is not None
    assert groups.tolist() == [0, 1, 1, 1, 1, 0]
    assert published.expert_groups([5, 7]) is None


@pytest.mark.parametrize(("shape", "kind"), [((8, 1, 4), "rms_unit_offset"), ((8, 4, 1), "rms")])
def test_norms_that_mlx_stores_whole_are_not_shifted(shape: tuple[int, ...], kind: str) -> None:
    text = {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
        "max_position_embeddings": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [1, 1, 0]},
        "vocab_size": 50,
    }
    family = families.load({"model_type": "qwen3_5", "text_config": text, "vision_config": {}}, {})
    name = "model.language_model.layers.0.linear_attn.conv1d.weight"
    family.inspect([StoredTensor(name, torch.float32, shape, Path("x"), 0)])
    assert family.decoder().norm == kind
