"""Tiny Moondream 3 checkpoints, named and laid out as their authors publish them."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

RESERVED = tuple(f"<|md_reserved_{i}|>" for i in range(12))
TOKENIZER = files(
    byte_level(("<|endoftext|>", *RESERVED), first=True),
    bos="<|endoftext|>",
    eos="<|endoftext|>",
)


def _word(text: str) -> list[int]:
    return TOKENIZER.tokenizer.encode(text, add_special_tokens=False).ids


def _templates() -> dict[str, Any]:
    caption, words = _word("caption"), ("short", "normal", "long")
    return {
        "caption": {word: [1, *caption, 2, *_word(word), 3] for word in words},
        "query": {"prefix": [1, *_word("query"), 2], "suffix": [3]},
        "detect": {"prefix": [1, *_word("detect"), 2], "suffix": [3]},
        "point": {"prefix": [1, *_word("point"), 2], "suffix": [3]},
    }


# The authors' table and head are bare, so that the usual sizes would leave nothing but the bias. A
# norm that is called `ln` alone would have the usual size of a bias.
GAINS = ((r"wte$", 3.0), (r"lm_head\.bias$", 0.0), (r"\.ln\.weight$", 10.0))


def _case(variant: str, text: dict, vision: dict, *, region_norm: bool) -> Case:
    vision = {
        "crop_size": 70,
        "enc_dim": 24,
        "enc_ff_dim": 40,
        "enc_n_heads": 2,
        "enc_n_layers": 5,
        "enc_patch_size": 14,
        "max_crops": 6,
        "overlap_margin": 1,
        "proj_inner_dim": 56,
        "proj_out_dim": 64,
        **vision,
    }
    patches = (vision["crop_size"] // vision["enc_patch_size"]) ** 2
    inner = {
        "region": {
            "coord_feat_dim": 16,
            "coord_out_dim": 64,
            "dim": 64,
            "ln": region_norm,
            "size_feat_dim": 24,
            "size_out_dim": 128,
        },
        "text": {
            "dim": 64,
            "ff_dim": 96,
            "n_heads": 2,
            "n_kv_heads": 2,
            "n_layers": 4,
            "prefix_attn": patches + 1,
            "vocab_size": TOKENIZER.size,
            "moe": {
                "expert_inner_dim": 24,
                "experts_per_token": 3,
                "num_experts": 6,
                "start_layer": 2,
            },
            **text,
        },
        "tokenizer": {"templates": _templates()},
        "vision": vision,
    }
    return Case(
        family="moondream3",
        variant=variant,
        model_class="",
        oracle="moondream3",
        config={
            "architectures": ["HfMoondream"],
            "config": inner,
            "model_type": "moondream3",
        },
        tokenizer=TOKENIZER,
        images=1,
        two_turns=False,
        large=(200, 130),
        gains=GAINS,
    )


CASES: tuple[Case, ...] = (
    _case("experts", {}, {}, region_norm=True),
    _case(
        "other_sizes",
        {"n_heads": 4, "n_kv_heads": 4, "rope_theta": 10000.0},
        {"crop_size": 56, "enc_n_layers": 4},
        region_norm=False,
    ),
)
