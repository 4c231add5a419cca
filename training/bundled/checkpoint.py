"""The checkpoint folder: tokenizer, chat template, configs, and the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from training.bundled import page

# The family's special tokens, in its own order; ids start at 0.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Pieces that are one token whenever they stand; everything else is read byte by byte, so that
# reading a word that training never saw is no different from reading any other.
SKELETON = (
    "```json\n[",
    "]\n```",
    "\n```",
    '\n\t{"bbox_2d": [',
    '], "label": "',
    '"},',
    '"}\n]\n```',
    " --- |",
    "system\n",
    "user\n",
    "assistant\n",
)
WORDS_TEXT = """
What How Where Which Is are is the The in of and a an there text image picture Read Locate Describe
Find Detect many much does say on this that to all every shapes shape circle circles square squares
triangle triangles rectangle rectangles star stars diamond diamonds pentagon pentagons oval ovals
cross crosses red green blue yellow orange purple pink brown black white gray light background
bounding box boxes JSON json bbox coordinates return give Give Answer with its Output format total
Total TOTAL Subtotal SUBTOTAL Tax TAX Cash CASH Change CHANGE Card CARD price cost receipt table
Markdown line lines first last second word row rows columns column shows at left right top bottom
center items item from was paid you do see see Please please Transcribe Convert Write it one images
Thank Thanks for or by be as not Yes No says says: Image contains value bar bars chart words
"""
WORDS = WORDS_TEXT.split()
MROPE_SECTION = (12, 10, 10)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url', 'input_image') or 'image' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url', 'input_video') or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _as_bytes(text: str) -> str:
    """Text in the byte-level vocabulary's characters."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in level.pre_tokenize_str(text))


def build_tokenizer() -> Tokenizer:
    """Bytes, whole common words (with and without a space before) and the JSON skeleton."""
    entries = list(SPECIAL) + _byte_characters()
    entries += [_as_bytes(piece) for piece in SKELETON]
    for word in dict.fromkeys(WORDS):
        if len(word) > 1:
            entries += [word] if word[0].isupper() else []
            entries.append(_as_bytes(" " + word))
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    escaped = [
        "".join("\\" + char if char in '[]{}"|`' else char for char in piece)
        for piece in sorted(SKELETON, key=len, reverse=True)
    ]
    pattern = "|".join(escaped) + r"| ?[A-Za-z]+|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def build_config(vocab_size: int) -> Qwen3VLConfig:
    """The shape: 5.8 million parameters, every width a multiple of 64."""
    ids = {token: index for index, token in enumerate(SPECIAL)}
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": list(MROPE_SECTION),
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": None,
    }
    vision = {
        "depth": 5,
        "hidden_size": 192,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 512,
        "num_heads": 3,
        "in_channels": 3,
        "patch_size": page.PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 256,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [2],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        dtype="bfloat16",
    )


def build_model(tokenizer: Tokenizer) -> Qwen3VLForConditionalGeneration:
    """The model with fresh float32 weights."""
    config = build_config(tokenizer.get_vocab_size())
    return Qwen3VLForConditionalGeneration(config).float()


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _preprocessor(kind: dict[str, object]) -> dict[str, object]:
    return {
        "size": {"shortest_edge": page.MIN_PIXELS, "longest_edge": page.MAX_PIXELS},
        "patch_size": page.PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        **kind,
    }


def save_folder(folder: Path, model: Qwen3VLForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Writes an ordinary checkpoint folder with bfloat16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    config["dtype"] = "bfloat16"
    _write(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write(
        folder / "preprocessor_config.json",
        _preprocessor({"image_processor_type": "Qwen2VLImageProcessor"}),
    )
    video = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "fps": 2,
        "min_frames": 4,
        "max_frames": 16,
    }
    _write(folder / "video_preprocessor_config.json", _preprocessor(video))
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": 0,
            "eos_token_id": [2, 0],
            "pad_token_id": 0,
            "do_sample": False,
            "max_new_tokens": 512,
        },
    )
