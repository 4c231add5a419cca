"""Which file serves which `model_type`."""

# model_type -> the file in this folder whose FAMILY serves it
MODULES = {
    "deepseek_vl": "deepseek_vl",
    "deepseek_vl_hybrid": "deepseek_vl_hybrid",
    "deepseek_vl_v2": "deepseek_vl_v2",
    "deepseekocr": "deepseekocr",
    "deepseekocr_2": "deepseekocr_2",
    "dots_ocr": "dots_ocr",
    "ernie4_5_moe_vl": "ernie4_5_moe_vl",
    "florence2": "florence2",
    "gemma3": "gemma3",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4",
    "idefics2": "idefics2",
    "idefics3": "idefics3",
    "janus": "janus",
    "jina_vlm": "jina_vlm",
    "llama4": "llama4",
    "internvl": "internvl",
    "internvl_chat": "internvl_chat",
    "multi_modality": "multi_modality",
    "molmo": "molmo",
    "molmo_point": "molmo_point",
    "moondream3": "moondream3",
    "multi_modality_hybrid": "multi_modality_hybrid",
    "llava": "llava",
    "llava_next": "llava_next",
    "minicpmo": "minicpmo",
    "mistral3": "mistral3",
    "mllama": "mllama",
    "paligemma": "paligemma",
    "phi3_v": "phi3_v",
    "phi4-siglip": "phi4_siglip",
    "phi4mm": "phi4mm",
    "pixtral": "pixtral",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "smolvlm": "smolvlm",
    "voxtral": "voxtral",
}

# other spellings that published configs carry -> the name above
ALIASES: dict[str, str] = {
    "jvlm": "jina_vlm",
    "phi4_multimodal": "phi4mm",
    "phi4_siglip": "phi4-siglip",
    "ernie4_5_vl_moe": "ernie4_5_moe_vl",
    "deepseek_ocr2": "deepseekocr_2",
}

# an architecture that makes a checkpoint another family than its `model_type` says
BY_ARCHITECTURE = {
    "DeepseekOCRForCausalLM": "deepseekocr",
    "DeepseekOCR2ForCausalLM": "deepseekocr_2",
}

# a `model_type` whose tower, by its own class or `model_type`, makes it another family
BY_TOWER = {
    ("multi_modality", "HybridVisionTower"): "multi_modality_hybrid",
    ("llava", "pixtral"): "pixtral",
}

# what to try after the bundled model: small, and good at pictures
SUGGESTION = "Qwen/Qwen3-VL-2B-Instruct"
