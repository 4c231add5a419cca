"""Tiny Voxtral checkpoints: a tekken.json, no chat template, sounds only."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoints import Case
from ..tiny_tokenizer import GPT4_SPLIT, byte_level, files

# Control tokens have the ranks that the published file gives those it is about.
NAMED = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[TRANSCRIBE]",
}
CONTROL = [NAMED.get(rank, f"<SPECIAL_{rank}>") for rank in range(40)]
SECONDS = 30
RATE = 16_000


def tekken() -> dict[str, Any]:
    """A tekken.json: the 256 bytes, then byte strings in the order of their merging."""
    tokenizer = byte_level((), split=GPT4_SPLIT)
    learned = [tokenizer.decode([index]) for index in range(256, tokenizer.get_vocab_size())]
    strings = [bytes([value]) for value in range(256)]
    strings += [text.encode() for text in learned if "�" not in text]
    return {
        "audio": {
            "audio_encoding_config": {"hop_length": 160, "num_mel_bins": 128, "window_size": 400},
            "chunk_length_s": 30.0,
            "frame_rate": 12.5,
            "sampling_rate": RATE,
        },
        "config": {
            "default_num_special_tokens": len(CONTROL),
            "default_vocab_size": len(CONTROL) + len(strings),
            "num_vocab_tokens": len(strings),
            "pattern": GPT4_SPLIT,
            "version": "v7",
        },
        "special_tokens": [
            {"is_control": True, "rank": rank, "token_str": token}
            for rank, token in enumerate(CONTROL)
        ],
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(raw).decode(),
                "token_str": raw.decode("utf-8", "replace"),
            }
            for rank, raw in enumerate(strings)
        ],
        "version": 7,
    }


TEKKEN = tekken()
VOCABULARY = TEKKEN["config"]["default_vocab_size"]


def encode_text(text: str) -> list[int]:
    """Byte-level BPE by rank, plainly: the lowest-ranked pair is merged until there is none."""
    import regex

    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in TEKKEN["vocab"]}
    ids: list[int] = []
    for word in regex.findall(GPT4_SPLIT, text):
        parts = [bytes([value]) for value in word.encode()]
        while len(parts) > 1:
            pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], 1 << 30))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = [pairs[best]]
        ids += [ranks[part] + len(CONTROL) for part in parts]
    return ids


def encode(folder: Any, messages: Sequence[dict[str, Any]], audio: Sequence[Any]) -> dict[str, Any]:
    """A chat with sounds as mistral-common 1.13 writes it: 375 tokens for every 30 s begun."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    sounds = iter(audio)
    ids = [CONTROL.index("<s>")]
    features: list[torch.Tensor] = []
    for message in messages:
        from_user = message["role"] == "user"
        ids += [CONTROL.index("[INST]")] if from_user else []
        for part in message["content"]:
            if part["type"] == "text":
                ids += encode_text(part["text"])
                continue
            mel = extractor(
                next(sounds),
                sampling_rate=RATE,
                padding=True,
                truncation=False,
                pad_to_multiple_of=SECONDS * RATE,
                return_tensors="pt",
            )["input_features"]
            chunks = mel.reshape(mel.shape[1], -1, 3000).transpose(0, 1)
            features.append(chunks)
            ids += [CONTROL.index("[BEGIN_AUDIO]")]
            ids += [CONTROL.index("[AUDIO]")] * (375 * len(chunks))
        ids += [CONTROL.index("[/INST]" if from_user else "</s>")]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if features:
        inputs["input_features"] = torch.cat(features)
    return inputs


def _voxtral() -> tuple[Case, Case]:
    class_name = "VoxtralForConditionalGeneration"

    def config(text: dict[str, Any], sound: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "audio_config": {
                "model_type": "voxtral_encoder",
                "activation_function": "gelu",
                "head_dim": 12,
                "hidden_size": 24,
                "intermediate_size": 96,
                "max_source_positions": 1500,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "num_mel_bins": 128,
                "scale_embedding": False,
                "vocab_size": 51866,
                **sound,
            },
            "audio_token_id": CONTROL.index("[AUDIO]"),
            "hidden_size": 40,
            "model_type": "voxtral",
            "projector_hidden_act": "gelu",
            "text_config": {
                "model_type": "llama",
                "attention_bias": False,
                "head_dim": 16,
                "hidden_act": "silu",
                "hidden_size": 40,
                "intermediate_size": 72,
                "max_position_embeddings": 131072,
                "mlp_bias": False,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 100000000.0,
                "sliding_window": None,
                "vocab_size": VOCABULARY + 2,
                **text,
            },
            "torch_dtype": "float32",
            "vocab_size": VOCABULARY + 2,
        }

    def case(variant: str, **settings: Any) -> Case:
        return Case(
            family="voxtral",
            variant=variant,
            model_class=class_name,
            tokenizer=files(byte_level(())),
            template_file="tekken.json",
            files={
                "tekken.json": TEKKEN,
                "preprocessor_config.json": {
                    "chunk_length": SECONDS,
                    "feature_extractor_type": "WhisperFeatureExtractor",
                    "feature_size": 128,
                    "hop_length": 160,
                    "n_fft": 400,
                    "n_samples": SECONDS * RATE,
                    "nb_max_frames": 3000,
                    "padding_side": "right",
                    "padding_value": 0.0,
                    "processor_class": "VoxtralProcessor",
                    "return_attention_mask": False,
                    "sampling_rate": RATE,
                },
            },
            generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11},
            encode=encode,
            images=0,
            audio=True,
            **settings,
        )

    wide = {"num_key_value_heads": 1, "head_dim": 10, "rope_theta": 10000.0}
    return (
        case("published", config=config({}, {})),
        case(
            "wide_encoder",
            config=config(wide, {"hidden_size": 36, "intermediate_size": 144, "head_dim": 18}),
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = _voxtral()
