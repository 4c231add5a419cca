"""Tiny Gemma 3n checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import files, sentencepiece_like
from . import templates
from .gemma import GEMMA_FIRST

# Tokens of pictures and of sounds stand in tables of their own, after the text's vocabulary.
SEEN = ("<end_of_image>", "<image_soft_token>", *[f"<unused_seen_{index}>" for index in range(6)])
HEARD = ("<end_of_audio>", "<audio_soft_token>", *[f"<unused_heard_{index}>" for index in range(6)])
NAMED = {
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "boi_token": "<start_of_image>",
    "eoa_token": "<end_of_audio>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
TURNS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<start_of_audio>")
TOKENIZER = files(
    sentencepiece_like(GEMMA_FIRST, (*TURNS, *SEEN, *HEARD), bos="<bos>", prefix_space=False),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    extra={"extra_special_tokens": NAMED, **NAMED},
)
IDS = TOKENIZER.ids
TEXT_SIZE = IDS[SEEN[0]]


def _config(text: dict[str, Any], vision: dict[str, Any], sound: dict[str, Any]) -> dict[str, Any]:
    layers = text.get("num_hidden_layers", 4)
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "audio_config": {
            "model_type": "gemma3n_audio",
            "conf_attention_chunk_size": 4,
            "conf_attention_context_left": 5,
            "conf_attention_context_right": 0,
            "conf_attention_logit_cap": 50.0,
            "conf_conv_kernel_size": 5,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 2,
            "conf_positional_bias_size": 256,
            "conf_reduction_factor": 4,
            "conf_residual_weight": 0.5,
            "gradient_clipping": 10000000000.0,
            "hidden_size": 32,
            "input_feat_size": 128,
            "rms_norm_eps": 1e-6,
            "sscp_conv_channel_size": [8, 4],
            "sscp_conv_group_norm_eps": 0.001,
            "sscp_conv_kernel_size": [[3, 3], [3, 3]],
            "sscp_conv_stride_size": [[2, 2], [2, 2]],
            "vocab_offset": TEXT_SIZE + len(SEEN),
            "vocab_size": len(HEARD),
            **sound,
        },
        "audio_soft_tokens_per_image": 24,
        "audio_token_id": IDS["<audio_soft_token>"],
        "boa_token_id": IDS["<start_of_audio>"],
        "boi_token_id": IDS["<start_of_image>"],
        "eoa_token_id": IDS["<end_of_audio>"],
        "eoi_token_id": IDS["<end_of_image>"],
        "eos_token_id": [1, IDS["<end_of_turn>"]],
        "image_token_id": IDS["<image_soft_token>"],
        "model_type": "gemma3n",
        "text_config": {
            "model_type": "gemma3n_text",
            "activation_sparsity_pattern": [0.9] * 2 + [0.0] * (layers - 2),
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_num_inputs": 4,
            "final_logit_softcapping": 30.0,
            "head_dim": 16,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 48,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": [80] * layers,
            "laurel_rank": 6,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 20,
            "vocab_size": TOKENIZER.size,
            "vocab_size_per_layer_input": TEXT_SIZE,
            **text,
        },
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "gemma3n_vision",
            "architecture": "mobilenetv5_300m_enc",
            "do_pooling": False,
            "hidden_size": 2048,
            # A sixteenth of the true width; its depth cannot be stated.
            "model_args": {"channel_multiplier": 0.0625, "msfa_output_resolution": 4},
            "num_classes": 2,
            "rms_norm_eps": 1e-6,
            "vocab_offset": TEXT_SIZE,
            "vocab_size": len(SEEN),
            **vision,
        },
        "vision_soft_tokens_per_image": 16,
    }


def _case(variant: str, size: int, **settings: Any) -> Case:
    return Case(
        family="gemma3n",
        variant=variant,
        model_class="Gemma3nForConditionalGeneration",
        tokenizer=TOKENIZER,
        chat_template=templates.GEMMA3N,
        files={
            "preprocessor_config.json": {
                "chunk_length_s": 32.0,
                "dither": 0.0,
                "do_convert_rgb": None,
                "do_normalize": False,
                "do_rescale": True,
                "do_resize": True,
                "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
                "feature_size": 128,
                "fft_length": 1024,
                "fft_overdrive": True,
                "frame_length": 512,
                "hop_length": 160,
                "image_mean": [0.5, 0.5, 0.5],
                "image_processor_type": "SiglipImageProcessorFast",
                "image_std": [0.5, 0.5, 0.5],
                "input_scale_factor": 1.0,
                "max_frequency": 7600.0,
                "mel_floor": 1e-5,
                "min_frequency": 125.0,
                "padding_side": "right",
                "padding_value": 0.0,
                "preemphasis": 0.97,
                "preemphasis_htk_flavor": True,
                "processor_class": "Gemma3nProcessor",
                "resample": 2,
                "rescale_factor": 0.00392156862745098,
                "return_attention_mask": True,
                "sampling_rate": 16000,
                "size": {"height": size, "width": size},
            },
            "processor_config.json": {
                "audio_seq_length": 24,
                "image_seq_length": 16,
                "processor_class": "Gemma3nProcessor",
            },
        },
        generation={
            "bos_token_id": 2,
            "eos_token_id": [1, IDS["<end_of_turn>"]],
            "pad_token_id": 0,
        },
        audio=True,
        needs=("timm", "torchvision"),
        gains=((r"embed_tokens", 0.3),),
        **settings,
    )


CASES: tuple[Case, ...] = (
    _case("shared_values", 64, config=_config({}, {}, {})),
    _case(
        "all_values",
        96,
        config=_config(
            {
                "activation_sparsity_pattern": [0.0, 0.8, 0.0],
                "altup_active_idx": 1,
                "altup_num_inputs": 3,
                "intermediate_size": [60, 72, 60],
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "num_hidden_layers": 3,
                "num_key_value_heads": 1,
                "num_kv_shared_layers": 0,
            },
            {},
            {"conf_num_hidden_layers": 3},
        ),
        manner="saved",
    ),
)
