"""Tiny Phi-4-multimodal checkpoints as Microsoft publishes them, with an adapter a modality.

Transformers' class has no adapters of its own: the reference for a request with a picture is the
model with the vision adapter added to its weights, and so on.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..checkpoints import Case
from . import phi
from .authors import authors_case, renamed

# rank and alpha of each; odd on purpose, so that no axis can be mistaken for another
ADAPTERS = {"vision": (5, 10), "speech": (7, 3)}
ADAPTED = re.compile(r"^model\.layers\.\d+\.(self_attn\.(qkv|o)|mlp\.(gate_up|down))_proj$")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def _adapters(weights: dict[str, torch.Tensor]) -> dict[tuple[str, str], tuple[torch.Tensor, ...]]:
    """(module, adapter) to its A (rank, in) and B (out, rank)."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name in sorted(weights):
        module = name.removesuffix(".weight")
        if not ADAPTED.match(module):
            continue
        out, into = weights[name].shape
        for adapter, (rank, _) in ADAPTERS.items():
            down = torch.randn(rank, into, generator=generator) / into**0.5
            up = torch.randn(out, rank, generator=generator) / rank**0.5
            found[module, adapter] = (down, up)
    return found


def merge(source: Path, adapter: str, target: Path) -> None:
    """The reference's folder with one adapter added to its weights."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    rank, alpha = ADAPTERS[adapter]
    for (module, name), (down, up) in _adapters(weights).items():
        if name == adapter:
            weights[f"{module}.weight"] += alpha / rank * (up @ down)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


RULES = (
    (r"img_projection_up\.", "img_projection.0."),
    (r"img_projection_down\.", "img_projection.2."),
    (r"sub_img_feature_extensor$", "sub_GN"),
    (r"global_img_feature_extensor$", "glb_GN"),
    (r"up_proj_for_speech\.", "audio_projection.speech.0."),
    (r"down_proj_for_speech\.", "audio_projection.speech.2."),
    (r"up_proj_for_vision_speech\.", "audio_projection.vision.0."),
    (r"down_proj_for_vision_speech\.", "audio_projection.vision.2."),
    (r"(feed_forward_(?:in|out))\.gate_up_proj\.", r"\1.net.0.linear."),
    (r"(feed_forward_(?:in|out))\.down_proj\.", r"\1.net.2."),
    (r"(encoders\.\d+\.self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (r"(encoders\.\d+\.self_attn)\.o_proj\.", r"\1.linear_out."),
)


def publish(source: Path, target: Path) -> None:
    """The authors' folder: their config, names, and both adapters beside the base weights."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(source / name, target / name)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write(target, "tokenizer_config.json", {**tokenizer, "chat_template": TEMPLATE})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write(target, "config.json", _config(config))
    preprocessor = json.loads((source / "preprocessor_config.json").read_text(encoding="utf-8"))
    _write(
        target,
        "preprocessor_config.json",
        {
            "audio_compression_rate": 8,
            "audio_downsample_rate": 1,
            "audio_feat_stride": 1,
            "dynamic_hd": preprocessor["dynamic_hd"],
            "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
            "image_processor_type": "Phi4MMImageProcessor",
            "processor_class": "Phi4MMProcessor",
        },
    )
    weights = load_file(source / "model.safetensors")
    published = {}
    for name, value in renamed(weights, RULES).items():
        module = name.removesuffix(".weight")
        base = f"{module}.base_layer.weight" if ADAPTED.match(module) else name
        published[base] = value
    for (module, adapter), (down, up) in _adapters(weights).items():
        published[f"{module}.lora_A.{adapter}.weight"] = down
        published[f"{module}.lora_B.{adapter}.weight"] = up
    save_file(published, target / "model.safetensors", metadata={"format": "pt"})


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(config: dict[str, Any]) -> dict[str, Any]:
    sound, vision = config["audio_config"], config["vision_config"]
    text = {
        name: value
        for name, value in config.items()
        if name not in ("audio_config", "vision_config", "architectures", "model_type")
    }
    layer = r"((layers.*self_attn\.(qkv|o)_proj)|(layers.*mlp\.(gate_up|down)_proj))"
    loras = {
        f"{name}_lora": {"dp": 0.0, "layer": layer, "lora_alpha": alpha, "r": rank}
        for name, (rank, alpha) in ADAPTERS.items()
    }
    return {
        **text,
        **loras,
        "architectures": ["Phi4MMForCausalLM"],
        "audio_processor": {
            "config": {
                "activation": "swish",
                "attention_dim": sound["hidden_size"],
                "attention_heads": sound["num_attention_heads"],
                "audio_token_id": sound["audio_token_id"],
                "batch_norm": False,
                "bias_in_glu": True,
                "causal": True,
                "chunk_size": -1,
                "cnn_layer_norm": True,
                "conv_activation": "swish",
                "conv_glu_type": "swish",
                "depthwise_multiplier": 1,
                "depthwise_seperable_out_channel": sound["depthwise_separable_out_channel"],
                "encoder_embedding_config": {"input_size": 80},
                "ext_pw_kernel_size": 1,
                "ext_pw_out_channel": sound["ext_pw_out_channel"],
                "input_layer": "nemo_conv",
                "input_size": 80,
                "kernel_size": 3,
                "left_chunk": 18,
                "linear_units": sound["intermediate_size"],
                "nemo_conv_settings": {"conv_channels": sound["nemo_conv_channels"]},
                "num_blocks": sound["num_blocks"],
                "relative_attention_bias_args": {
                    "t5_bias_max_distance": sound["bias_max_distance"],
                    "type": "t5",
                },
                "time_reduction": 8,
            },
            "name": "cascades",
        },
        "embd_layer": {
            "audio_embd_layer": {
                "compression_rate": 8,
                "downsample_rate": 1,
                "embedding_cls": "audio",
                "projection_cls": "mlp",
                "use_conv_downsample": False,
                "use_qformer": False,
            },
            "embedding_cls": "image_audio",
            "image_embd_layer": {
                "crop_size": vision["crop_size"],
                "embedding_cls": "tune_image",
                "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
        },
        "full_attn_mod": 1,
        "img_processor": None,
        "lm_head_bias": False,
        "mlp_bias": False,
        "model_type": "phi4mm",
        # The published config leaves the tower's sizes to the code; tiny ones must be stated.
        "vision_config": vision,
    }


CASES: tuple[Case, ...] = (
    authors_case(phi.CASES[0], "phi4mm", publish, variant="adapters", merge=merge),
)
