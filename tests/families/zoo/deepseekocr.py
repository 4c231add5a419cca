"""Tiny DeepSeek-OCR checkpoints, named and laid out as DeepSeek publishes them."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

BAR, LOW = "\uff5c", "\u2581"
BOS, EOS, PAD = (
    f"<{BAR}{LOW.join(words)}{BAR}>"
    for words in (("begin", "of", "sentence"), ("end", "of", "sentence"), ("", "pad", ""))
)
TAGS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CELLS = ("<td>", "</td>")
TOKENIZER = files(
    byte_level((BOS, EOS, PAD, "<image>", *TAGS, *CELLS), bos=BOS, plain=CELLS),
    bos=BOS,
    eos=EOS,
    pad=PAD,
)


def _case(variant: str, text: dict, sam: dict, options: dict[str, Any]) -> Case:
    ids = TOKENIZER.ids
    language = {
        "architectures": ["DeepseekOCRForCausalLM"],
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "first_k_dense_replace": 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "kv_lora_rank": None,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "float32",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": TOKENIZER.size,
        **text,
    }
    return Case(
        family="deepseekocr",
        variant=variant,
        model_class="",
        oracle="deepseekocr",
        config={
            **language,
            "candidate_resolutions": [[1024, 1024]],
            "global_view_pos": "head",
            "language_config": language,
            "model_type": "deepseek_vl_v2",
            "projector_config": {
                "input_dim": 64,
                "model_type": "mlp_projector",
                "n_embed": 64,
                "projector_type": "linear",
            },
            "tile_tag": "2D",
            "vision_config": {
                "image_size": 128,
                "mlp_ratio": 3.7362,
                "model_name": "deeplip_b_l",
                "model_type": "vision",
                "width": {
                    "clip-l-14-224": {
                        "heads": 2,
                        "image_size": 42,
                        "layers": 2,
                        "patch_size": 14,
                        "width": 32,
                    },
                    "sam_vit_b": {
                        "downsample_channels": [40, 32],
                        "global_attn_indexes": [1],
                        "heads": 2,
                        "layers": 3,
                        "width": 24,
                        **sam,
                    },
                },
            },
        },
        tokenizer=TOKENIZER,
        files={
            "processor_config.json": {
                "candidate_resolutions": [[1024, 1024]],
                "downsample_ratio": 4,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "image_token": "<image>",
                "patch_size": 16,
                "processor_class": "DeepseekVLV2Processor",
            }
        },
        processor_kwargs=options,
        large=(200, 130),
    )


CASES: tuple[Case, ...] = (
    _case("tiles", {}, {}, {"base_size": 256, "image_size": 128}),
    _case(
        "whole_only",
        {"norm_topk_prob": True, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2},
        {"global_attn_indexes": [0, 2]},
        {"base_size": 128, "image_size": 128, "cropping": False},
    ),
)  # fmt: skip
