"""The same tiny models in their authors' layouts, which Transformers itself does not read.

The reference runs on Transformers' folder; a function here turns it into the folder that Opsin
reads: the authors' config keys, weight names and files.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..checkpoints import Case
from . import deepseek, ernie, templates, vlm_more

Weights = dict[str, torch.Tensor]


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _carry(source: Path, target: Path, *names: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)


def renamed(weights: Weights, rules: tuple[tuple[str, str], ...]) -> Weights:
    """Weights under other names; rules apply one after another."""
    result = {}
    for name, value in weights.items():
        new_name = name
        for pattern, replacement in rules:
            new_name = re.sub(pattern, replacement, new_name)
        result[new_name] = value
    return result


def joined(weights: Weights, parts: tuple[str, ...], whole: str) -> Weights:
    """Weights with `parts` of each module (the queries', keys' and values') put into one."""
    result = dict(weights)
    for name in weights:
        found = re.match(rf"(.*)\.{parts[0]}\.(weight|bias)$", name)
        if found:
            pieces = [result.pop(f"{found[1]}.{part}.{found[2]}") for part in parts]
            result[f"{found[1]}.{whole}.{found[2]}"] = torch.cat(pieces)
    return result


def _save(weights: Weights, target: Path) -> None:
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})


def internvl_chat(source: Path, target: Path) -> None:
    """InternVL as OpenGVLab publishes it."""
    _carry(source, target, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    config = _read(source, "config.json")
    vision = config["vision_config"]
    text = {**config["text_config"], "torch_dtype": "float32"}
    size = vision["image_size"][0]
    _write(
        target,
        "config.json",
        {
            "architectures": ["InternVLChatModel"],
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": size,
            "hidden_size": text["hidden_size"],
            "llm_config": text,
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "model_type": "internvl_chat",
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_thumbnail": True,
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "drop_path_rate": 0.0,
                "hidden_act": "gelu",
                "hidden_size": vision["hidden_size"],
                "image_size": size,
                "initializer_factor": 1.0,
                "intermediate_size": vision["intermediate_size"],
                "layer_norm_eps": vision["layer_norm_eps"],
                "model_type": "intern_vit_6b",
                "norm_type": vision["norm_type"],
                "num_attention_heads": vision["num_attention_heads"],
                "num_channels": 3,
                "num_hidden_layers": vision["num_hidden_layers"],
                "patch_size": vision["patch_size"][0],
                "qk_normalization": vision["use_qk_norm"],
                "qkv_bias": vision["attention_bias"],
            },
        },
    )
    _write(
        target,
        "preprocessor_config.json",
        {
            "crop_size": size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": size,
        },
    )
    weights = joined(load_file(source / "model.safetensors"), ("q_proj", "k_proj", "v_proj"), "qkv")
    # Only the tower's projections are joined: the text model keeps its own apart.
    text_weights = {
        name: value
        for name, value in load_file(source / "model.safetensors").items()
        if name.startswith("language_model.")
    }
    tower = {n: v for n, v in weights.items() if not n.startswith("language_model.")}
    rules = (
        (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
        (
            r"^vision_tower\.embeddings\.position_embeddings$",
            "vision_model.embeddings.position_embedding",
        ),
        (
            r"^vision_tower\.embeddings\.patch_embeddings\.projection\.",
            "vision_model.embeddings.patch_embedding.",
        ),
        (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
        (r"\.lambda_([12])$", r".ls\1"),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.projection_layer\.", ".attn.proj."),
        (r"\.attention\.", ".attn."),
        (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
        (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
        (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    )
    _save(renamed(tower, rules) | text_weights, target)


def ernie4_5_moe_vl(source: Path, target: Path) -> None:
    """ERNIE 4.5 VL as Baidu publishes it: a flat config; Transformers keeps the weights' names."""
    _carry(
        source,
        target,
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
    )
    config = _read(source, "config.json")
    text, vision = config["text_config"], config["vision_config"]
    preprocessor = _read(source, "preprocessor_config.json")
    size = preprocessor.pop("size")
    _write(
        target,
        "preprocessor_config.json",
        {
            **preprocessor,
            "image_processor_type": "Ernie_45T_VLImageProcessor",
            "max_pixels": size["longest_edge"],
            "min_pixels": size["shortest_edge"],
            "processor_class": "Ernie_45T_VLProcessor",
        },
    )
    experts, layers = text["moe_num_experts"], text["num_hidden_layers"]
    _write(
        target,
        "config.json",
        {
            "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "freq_allocation": text["rope_parameters"]["mrope_section"][2],
            "hidden_act": "silu",
            "hidden_size": text["hidden_size"],
            "im_patch_id": config["image_token_id"],
            "image_end_token_id": config["image_end_token_id"],
            "image_start_token_id": config["image_start_token_id"],
            "intermediate_size": text["intermediate_size"],
            "max_position_embeddings": text["max_position_embeddings"],
            "model_type": "ernie4_5_moe_vl",
            "moe_capacity": [128, 128, 128],
            "moe_gate": "topk",
            "moe_intermediate_size": text["moe_intermediate_size"],
            "moe_k": text["moe_k"],
            "moe_layer_end_index": [layers, layers - 1],
            "moe_layer_interval": 1,
            "moe_layer_start_index": [1, 1],
            "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
            "moe_num_experts": [experts, experts],
            "moe_num_shared_experts": text["moe_num_shared_experts"],
            "moe_use_aux_free": True,
            "num_attention_heads": text["num_attention_heads"],
            "num_hidden_layers": layers,
            "num_key_value_heads": text["num_key_value_heads"],
            "pad_token_id": 0,
            "pixel_hidden_size": vision["hidden_size"],
            "rms_norm_eps": text["rms_norm_eps"],
            "rope_3d": True,
            "rope_theta": text["rope_parameters"]["rope_theta"],
            "spatial_conv_size": 2,
            "temporal_conv_size": 2,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "torch_dtype": "float32",
            "use_bias": text["use_bias"],
            "use_rmsnorm": True,
            "use_temporal_conv": True,
            "video_end_token_id": config["video_end_token_id"],
            "video_start_token_id": config["video_start_token_id"],
            "vision_config": {
                "depth": vision["depth"],
                "embed_dim": vision["hidden_size"],
                "hidden_act": "quick_gelu",
                "hidden_size": vision["hidden_size"],
                "in_channels": 3,
                "in_chans": 3,
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
                "model_type": "DFNRope_vision_transformer",
                "num_heads": vision["num_heads"],
                "patch_size": vision["patch_size"],
                "spatial_merge_size": 2,
                "spatial_patch_size": vision["patch_size"],
            },
            "vocab_size": text["vocab_size"],
        },
    )


def multi_modality(source: Path, target: Path) -> None:
    """Janus as DeepSeek publishes it, the tower's sizes stated beside the name they go by."""
    _carry(source, target, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    (target / "chat_template.jinja").write_text(templates.JANUS, encoding="utf-8")
    config = _read(source, "config.json")
    vision, text = config["vision_config"], config["text_config"]
    _write(
        target,
        "config.json",
        {
            "aligner_config": {
                "cls": "MlpProjector",
                "model_type": "aligner",
                "params": {
                    "depth": vision["depth"],
                    "input_dim": vision["hidden_size"],
                    "n_embed": text["hidden_size"],
                    "projector_type": "mlp_gelu",
                },
            },
            "architectures": ["MultiModalityCausalLM"],
            "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": {}},
            "language_config": {**text, "model_type": "llama"},
            "model_type": "multi_modality",
            "torch_dtype": "float32",
            "vision_config": {
                "cls": "CLIPVisionTower",
                "hidden_size": vision["hidden_size"],
                "image_size": vision["image_size"],
                "intermediate_size": int(vision["hidden_size"] * vision["mlp_ratio"]),
                "model_type": "vision",
                "num_attention_heads": vision["num_attention_heads"],
                "num_hidden_layers": vision["num_hidden_layers"],
                "params": {
                    "image_size": vision["image_size"],
                    "model_name": "siglip_large_patch16_384",
                    "select_feature": "same",
                    "select_layer": -1,
                },
                "patch_size": vision["patch_size"],
            },
        },
    )
    preprocessor = _read(source, "preprocessor_config.json")
    _write(
        target,
        "preprocessor_config.json",
        {
            "background_color": preprocessor["background_color"],
            "do_normalize": True,
            "image_mean": preprocessor["image_mean"],
            "image_processor_type": "VLMImageProcessor",
            "image_size": vision["image_size"],
            "image_std": preprocessor["image_std"],
            "min_size": 14,
            "processor_class": "VLChatProcessor",
            "rescale_factor": 0.00392156862745098,
        },
    )
    _write(
        target,
        "processor_config.json",
        {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": "<image_placeholder>",
            "mask_prompt": True,
            "num_image_tokens": vision["num_image_tokens"],
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
    )
    weights = load_file(source / "model.safetensors")
    seen = {n: v for n, v in weights.items() if n.startswith("model.vision_model.")}
    seen = joined(seen, ("q_proj", "k_proj", "v_proj"), "qkv")
    seen = {n: v[None] if "position_embedding" in n else v for n, v in seen.items()}
    tower = r"^model\.vision_model\.encoder\.layers\.(\d+)\."
    block = r"vision_model.vision_tower.blocks.\1."
    rules = (
        (
            r"^model\.vision_model\.embeddings\.patch_embedding\.",
            "vision_model.vision_tower.patch_embed.proj.",
        ),
        (
            r"^model\.vision_model\.embeddings\.position_embedding\.weight$",
            "vision_model.vision_tower.pos_embed",
        ),
        (tower + r"layer_norm([12])\.", block + r"norm\2."),
        (tower + r"self_attn\.qkv\.", block + "attn.qkv."),
        (tower + r"self_attn\.projection_layer\.", block + "attn.proj."),
        (tower + r"mlp\.", block + "mlp."),
        (r"^model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    )
    spoken = {
        name: value
        for name, value in weights.items()
        if re.match(r"(model\.(language_model|aligner)|lm_head)\.", name)
    }
    aligned = (
        (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
        (
            r"^model\.aligner\.hidden_layers\.(\d+)\.",
            lambda found: f"aligner.layers.{2 * int(found[1]) + 2}.",
        ),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
    drawn = {
        "gen_embed.weight": torch.zeros(16, 4),
        "gen_head.vision_head.weight": torch.zeros(16, 48),
        "gen_vision_model.quantize.embedding.weight": torch.zeros(16, 4),
        "gen_aligner.layers.0.weight": torch.zeros(48, 4),
        "vision_model.vision_tower.attn_pool.latent": torch.zeros(1, 1, 32),
    }
    _save(renamed(seen, rules) | renamed(spoken, aligned) | drawn, target)


def authors_case(
    case: Case, family: str, publish: Callable[[Path, Path], None], **changes: Any
) -> Case:
    """A case whose reference is `case` and whose folder for Opsin `publish` makes."""
    return dataclasses.replace(
        case, family=family, served_type=family, publish=publish, seed_of=case.name, **changes
    )


def _named(cases: tuple[Case, ...], name: str) -> Case:
    return next(case for case in cases if case.name == name)


CASES: tuple[Case, ...] = (
    authors_case(
        _named(vlm_more.CASES, "internvl-small"), "internvl_chat", internvl_chat, variant="qwen2"
    ),
    *(authors_case(case, "ernie4_5_moe_vl", ernie4_5_moe_vl) for case in ernie.CASES[:1]),
    *(
        authors_case(case, "multi_modality", multi_modality)
        for case in deepseek.CASES
        if case.name == "janus-untied"
    ),
)
