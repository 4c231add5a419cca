"""Tiny DeepSeek-VL2 checkpoints, named and laid out as DeepSeek publishes them."""

from __future__ import annotations

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

BAR, LOW = "\uff5c", "\u2581"
BOS, EOS, PAD = (
    f"<{BAR}{LOW.join(words)}{BAR}>"
    for words in (("begin", "of", "sentence"), ("end", "of", "sentence"), ("", "pad", ""))
)
TAGS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>")
TOKENIZER = files(byte_level((BOS, EOS, PAD, "<image>", *TAGS), bos=BOS), bos=BOS, eos=EOS, pad=PAD)


def _case(variant: str, text: dict, vision: dict, most_tiles: int, position: str) -> Case:
    ids, side = TOKENIZER.ids, vision["image_size"]
    tilings = [
        (i * side, j * side)
        for i in range(1, most_tiles + 1)
        for j in range(1, most_tiles + 1)
        if i * j <= most_tiles
    ]
    resolutions = [list(size) for size in tilings]
    return Case(
        family="deepseek_vl_v2",
        variant=variant,
        model_class="",
        oracle="deepseek_vl_v2",
        config={
            "architectures": ["DeepseekVLV2ForCausalLM"],
            "candidate_resolutions": resolutions,
            "global_view_pos": position,
            "language_config": {
                "architectures": ["DeepseekV2ForCausalLM"],
                "bos_token_id": ids[BOS],
                "eos_token_id": ids[EOS],
                "first_k_dense_replace": 1,
                "hidden_size": 64,
                "intermediate_size": 96,
                "lm_head": True,
                "max_position_embeddings": 4096,
                "model_type": "deepseek_v2",
                "moe_intermediate_size": 24,
                "n_group": 1,
                "n_shared_experts": 2,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "q_lora_rank": None,
                "rm_head": False,
                "topk_group": 1,
                "torch_dtype": "float32",
                "vocab_size": TOKENIZER.size,
                **text,
            },
            "model_type": "deepseek_vl_v2",
            "projector_config": {
                "input_dim": vision["width"],
                "model_type": "mlp_projector",
                "n_embed": 64,
            },
            "tile_tag": "2D",
            "torch_dtype": "float32",
            "vision_config": {
                "mlp_ratio": 3.7362,
                "model_name": "siglip_so400m_patch14_384",
                "model_type": "vision",
                **vision,
            },
        },
        tokenizer=TOKENIZER,
        files={
            "processor_config.json": {
                "add_special_token": False,
                "candidate_resolutions": resolutions,
                "downsample_ratio": 2,
                "ignore_id": -100,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "image_token": "<image>",
                "mask_prompt": False,
                "normalize": True,
                "pad_token": PAD,
                "patch_size": vision["patch_size"],
                "processor_class": "DeepseekVLV2Processor",
                "sft_format": "deepseek",
            }
        },
        large=(200, 130),
    )


CASES: tuple[Case, ...] = (
    _case(
        "plain",
        {
            "kv_lora_rank": None,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "topk_method": "greedy",
            "use_mla": False,
            "v_head_dim": 0,
        },
        # Three patches a side: the last token of a row is half empty.
        {"heads": 2, "image_size": 48, "layers": 2, "patch_size": 14, "width": 32},
        6,
        "head",
    ),
    _case(
        "latent",
        {
            "kv_lora_rank": 20,
            "n_routed_experts": 8,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "routed_scaling_factor": 2.0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "v_head_dim": 16,
        },
        {"heads": 4, "image_size": 64, "layers": 3, "patch_size": 8, "width": 48},
        4,
        "tail",
    ),
)
