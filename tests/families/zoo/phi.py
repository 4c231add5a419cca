"""Tiny Phi-4-multimodal checkpoints in Transformers' layout, which has no adapters."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

NAMED = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
TOKENIZER = files(
    byte_level(
        (
            "<|endoftext|>",
            "<|image|>",
            "<|audio|>",
            "<|assistant|>",
            "<|end|>",
            "<|user|>",
            "<|system|>",
        )
    ),
    bos="<|endoftext|>",
    eos="<|endoftext|>",
    pad="<|endoftext|>",
    extra={"extra_special_tokens": NAMED, **NAMED},
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif content['type'] == 'audio' %}{{ '<|audio|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def _phi4() -> tuple[Case, Case]:
    class_name = "Phi4MultimodalForCausalLM"
    ids = TOKENIZER.ids

    def config(text: dict[str, Any], vision: dict[str, Any], sound: dict[str, Any]) -> dict:
        return {
            "architectures": [class_name],
            "audio_config": {
                "model_type": "phi4_multimodal_audio",
                "audio_token_id": ids["<|audio|>"],
                "bias_max_distance": 100,
                "chunk_size": -1,
                "depthwise_separable_out_channel": 24,
                "ext_pw_out_channel": 24,
                "hidden_size": 24,
                "input_size": 80,
                "intermediate_size": 36,
                "kernel_size": 3,
                "nemo_conv_channels": 24,
                "num_attention_heads": 2,
                "num_blocks": 2,
                "time_reduction": 8,
                **sound,
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|endoftext|>"], ids["<|end|>"]],
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 80,
            "max_position_embeddings": 131072,
            "model_type": "phi4_multimodal",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 4096,
            "pad_token_id": ids["<|endoftext|>"],
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "long_factor": [1.0, 1.5, 4.0, 8.0, 12.0, 16.0],
                "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4],
                "type": "longrope",
            },
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            # 16 x 16 tokens a crop, as at the true size: the processor counts on it.
            "vision_config": {
                "model_type": "phi4_multimodal_vision",
                "crop_size": 128,
                "feature_layer": -2,
                "hidden_size": 24,
                "image_size": 128,
                "image_token_id": ids["<|image|>"],
                "intermediate_size": 40,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "patch_size": 4,
                **vision,
            },
            "vocab_size": TOKENIZER.size + 4,
            **text,
        }

    def case(variant: str, **settings: Any) -> Case:
        return Case(
            family="phi4_multimodal",
            variant=variant,
            model_class=class_name,
            tokenizer=TOKENIZER,
            chat_template=TEMPLATE,
            files={
                "preprocessor_config.json": {
                    "audio_compression_rate": 8,
                    "audio_downsample_rate": 1,
                    "audio_feat_stride": 1,
                    "dynamic_hd": 6,
                    "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
                    "feature_size": 80,
                    "image_mean": [0.5, 0.5, 0.5],
                    "image_processor_type": "Phi4MultimodalImageProcessorFast",
                    "image_std": [0.5, 0.5, 0.5],
                    "patch_size": 4,
                    "processor_class": "Phi4MultimodalProcessor",
                    "sampling_rate": 16000,
                    "size": {"height": 128, "width": 128},
                },
            },
            generation={
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": [ids["<|endoftext|>"], ids["<|end|>"]],
                "pad_token_id": ids["<|endoftext|>"],
            },
            quiet=(ids["<|image|>"], ids["<|audio|>"]),
            audio=True,
            large=(200, 100),
            needs=("torchvision",),
            **settings,
        )

    second = {
        "hidden_size": 48,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 8192,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "long_factor": [1.0, 2.0, 3.0],
            "short_factor": [1.0, 1.1, 1.4],
            "type": "longrope",
        },
        "tie_word_embeddings": False,
    }
    return (
        case("tied", config=config({}, {}, {})),
        case(
            "untied",
            config=config(
                second,
                {"feature_layer": -1},
                {"bias_symmetric": False, "nemo_conv_channels": 16, "num_blocks": 3},
            ),
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = _phi4()
