"""Seeds of the random weights, where 0 gives a model with too little to say.

A useful model's greedy answers hold many different tokens, change with the picture, and are never
a near tie that rounding could decide.
"""

SEEDS: dict[str, int] = {
    "qwen2_vl-published_tied": 1,
    "qwen2_vl-saved_untied": 1,
    "qwen3_vl-published_tied": 3,
    "llava-siglip_full_tied": 2,
    "qwen3_5-tied": 1,
    "internvl-large_tied": 2,
    "pixtral-inner_layer": 2,
    "llava_next-mistral_default": 1,
    "idefics2-split": 1,
    "paligemma-one": 2,
    "gemma4-effective": 1,
    "mllama-two_cross_layers": 4,
    "mllama-last_layer_crosses": 5,
    "llama4-every_layer_moe": 1,
    "ernie4_5_vl_moe-tied": 2,
    "ernie4_5_vl_moe-untied_bias": 5,
    "phi4_multimodal-untied": 3,
    "voxtral-published": 1,
    "phi4_multimodal-tied": 6,
    "voxtral-wide_encoder": 4,
    "gemma3n-shared_values": 8,
}
