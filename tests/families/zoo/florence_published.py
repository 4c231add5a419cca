"""Tiny Florence-2 checkpoints as Microsoft publishes them, whose code adds the special tokens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from ..checkpoints import Case
from ..tiny_tokenizer import TokenizerFiles, byte_level, files
from . import florence
from .authors import renamed

# In the order in which the authors' processor adds them.
ADDED = (
    "<od>",
    "</od>",
    "<ocr>",
    "</ocr>",
    *florence.LOCATIONS,
    *florence.TASKS[4:],
)
NAMES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
PLAIN = files(byte_level(florence.FIRST, bos="<s>", suffix="</s>", first=True), **NAMES)


def _whole() -> TokenizerFiles:
    """The tokenizer as Transformers' conversion leaves it, the picture's token last."""
    tokenizer = Tokenizer.from_str(PLAIN.tokenizer.to_str())
    added = (*ADDED, "<image>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    extra = {"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"}
    return files(tokenizer, **NAMES, extra=extra)


WHOLE = _whole()

RULES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.multi_modal_projector\.", ""),
    (r"^model\.", ""),
    (r"^image_position_embed\.", "image_pos_embed."),
    (r"^image_projection\.weight$", "image_projection"),
    (r"(convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.conv([12])\.", r".conv\1.fn.dw."),
    (r"spatial_block\.norm1\.", "spatial_block.window_attn.norm."),
    (r"channel_block\.norm1\.", "channel_block.channel_attn.norm."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"_attn\.(qkv|proj)\.", r"_attn.fn.\1."),
    (r"\.ffn\.fc(\d)\.", r".ffn.fn.net.fc\1."),
)


def publish(source: Path, target: Path) -> None:
    """The authors' folder: their config and names, and a tokenizer without the added tokens."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "preprocessor_config.json"):
        shutil.copy(source / name, target / name)
    PLAIN.tokenizer.save(str(target / "tokenizer.json"))
    _write(target, "tokenizer_config.json", {"model_max_length": 1024})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write(target, "config.json", published_config(config))
    save_file(
        published_weights(load_file(source / "model.safetensors")),
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the authors' words; the vocabulary ends before the picture's token."""
    vision, text = dict(config["vision_config"]), dict(config["text_config"])
    places = {"type": "learned_abs_2d", "max_pos_embeddings": vision.pop("max_position_embeddings")}
    frames = {"type": "COSINE", "max_temporal_embeddings": vision.pop("max_temporal_embeddings")}
    for name in ("activation_function", "in_channels", "mlp_ratio", "qkv_bias"):
        vision.pop(name)
    text |= {"model_type": "florence2_language", "vocab_size": text["vocab_size"] - 1}
    vision |= {
        "model_type": "davit",
        "dim_embed": vision.pop("embed_dim"),
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        "image_pos_embed": places,
        "visual_temporal_embedding": frames,
    }
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "ignore_index": -100,
        "is_encoder_decoder": True,
        "model_type": "florence2",
        "pad_token_id": 1,
        "projection_dim": vision["projection_dim"],
        "text_config": text,
        "torch_dtype": "float32",
        "vision_config": vision,
        "vocab_size": text["vocab_size"],
    }


def published_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the authors' names, with the copies and the zero bias that theirs hold."""
    found = renamed(weights, RULES)
    found["image_projection"] = found["image_projection"].T.contiguous()
    shared = found["language_model.model.shared.weight"][:-1].clone()
    found["language_model.model.shared.weight"] = shared
    for copy in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        found[f"language_model.{copy}.weight"] = shared.clone()
    found["language_model.final_logits_bias"] = torch.zeros(1, len(shared))
    return found


def _case() -> Case:
    base = florence.CASES[0]
    config = json.loads(json.dumps(base.config))
    config["text_config"]["vocab_size"] = WHOLE.size
    config["image_token_id"] = WHOLE.ids["<image>"]
    config["vision_config"]["mlp_ratio"] = 4.0  # which the authors' config does not state
    return dataclasses.replace(
        base,
        variant="authors",
        config=config,
        tokenizer=WHOLE,
        publish=publish,
        served_type="florence2",
    )


CASES: tuple[Case, ...] = (_case(),)
