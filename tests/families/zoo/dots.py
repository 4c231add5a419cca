"""Tiny dots.ocr checkpoints, named and laid out as rednote publishes them."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import QWEN_SPLIT, byte_level, files
from .qwen import CLIP_MEAN, CLIP_STD

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|imgpad|>",
    "<|img|>",
    "<|endofimg|>",
    "<|systemprompt|>",
    "<|endofsystemprompt|>",
    "<|user|>",
    "<|endofuser|>",
    "<|assistant|>",
    "<|endofassistant|>",
)
TOKENIZER = files(byte_level(SPECIAL, split=QWEN_SPLIT), eos="<|endoftext|>", pad="<|endoftext|>")
IDS = TOKENIZER.ids
TEMPLATE = (
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'system' %}\n"
    "        {{- '<|system|>' + m.content + '<|endofsystem|>\\n' }}\n"
    "    {%- elif m.role == 'user' %}\n"
    "        {{- '<|user|>' }}\n"
    "        {%- if m.content is string %}\n"
    "            {{- m.content }}\n"
    "        {%- else %}\n"
    "            {%- for part in m.content %}\n"
    "                {%- if part.type == 'image' or 'image' in part %}\n"
    "                    {{- '<|img|><|imgpad|><|endofimg|>' }}\n"
    "                {%- elif 'text' in part %}\n"
    "                    {{- part.text }}\n"
    "                {%- endif %}\n"
    "            {%- endfor %}\n"
    "        {%- endif %}\n"
    "        {{- '<|endofuser|>' }}\n"
    "    {%- elif m.role == 'assistant' %}\n"
    "        {{- '<|assistant|>' }}\n"
    "        {%- if m.content is string %}\n"
    "            {{- m.content }}\n"
    "        {%- else %}\n"
    "            {%- for part in m.content %}{{- part.text }}{%- endfor %}\n"
    "        {%- endif %}\n"
    "        {%- if not loop.last %}\n"
    "            {{- '<|endofassistant|>' }}\n"
    "        {%- endif %}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if messages[-1].role != 'assistant' %}\n"
    "    {{- '<|assistant|>' }}\n"
    "{%- endif %}\n"
)


def _case(variant: str, text: dict[str, Any], vision: dict[str, Any], largest: int) -> Case:
    whole_vision = {
        "attn_implementation": "flash_attention_2",
        "embed_dim": 32,
        "gradient_checkpointing": False,
        "hidden_size": 48,
        "init_merger_std": 0.02,
        "initializer_range": 0.02,
        "intermediate_size": 56,
        "is_causal": False,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "post_norm": True,
        "rms_norm_eps": 1e-5,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "use_bias": False,
        **vision,
    }
    return Case(
        family="dots_ocr",
        variant=variant,
        model_class="",
        oracle="dots_ocr",
        config={
            "architectures": ["DotsOCRForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 48,
            "image_token_id": IDS["<|imgpad|>"],
            "intermediate_size": 88,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "model_type": "dots_ocr",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_sliding_window": False,
            "video_token_id": IDS["<|video_pad|>"],
            "vision_config": whole_vision,
            "vocab_size": TOKENIZER.size + 9,
            **text,
        },
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        template_file="chat_template.json",
        files={
            "preprocessor_config.json": {
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": CLIP_MEAN,
                "image_processor_type": "Qwen2VLImageProcessor",
                "image_std": CLIP_STD,
                "max_pixels": largest,
                "merge_size": 2,
                "min_pixels": 3136,
                "patch_size": whole_vision["patch_size"],
                "processor_class": "Qwen2_5_VLProcessor",
                "resample": 3,
                "rescale_factor": 0.00392156862745098,
                "size": {"longest_edge": largest, "shortest_edge": 3136},
                "temporal_patch_size": 1,
            }
        },
        generation={
            "eos_token_id": [IDS["<|endofassistant|>"], IDS["<|endoftext|>"]],
            "max_length": 32768,
        },
    )


CASES: tuple[Case, ...] = (
    _case("published", {}, {}, 12544),
    _case(
        "biased_bare",
        {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_theta": 10000.0,
        },
        {
            "embed_dim": 48,
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "patch_size": 8,
            "post_norm": False,
            "use_bias": True,
        },
        8192,
    ),
)
