"""GGUF files of a checkpoint folder, as llama.cpp reads them: the text model and the tower.

    python bench/gguf_files.py CHECKPOINT OUT [--tower f16|bf16|q8_0]

Runs with the rival's Python: it needs numpy and `gguf` only. The vocabulary is made up
(bench/vocabulary.py), since random weights have none. Two shapes:
Qwen3-VL and Idefics3 over a Llama decoder. Speed does not depend on the order of rows within a
head, so it is left as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import vocabulary

TEXT = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
TOWER = {
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "norm1": "ln1",
    "norm2": "ln2",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}
WHOLE = {
    "embed_tokens": "token_embd",
    "text_model.norm": "output_norm",
    "language_model.norm": "output_norm",
    "lm_head": "output",
    "vision_model.embeddings.patch_embedding": "v.patch_embd",
    "vision_model.embeddings.position_embedding": "v.position_embd",
    "vision_model.post_layernorm": "v.post_ln",
    "modality_projection.proj": "mm.model.fc",
    "visual.patch_embed.proj": "v.patch_embd",
    "visual.pos_embed": "v.position_embd",
    "visual.merger.norm": "v.post_ln",
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
}


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a folder's safetensors files by name, bfloat16 as uint16, mapped."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        data = np.memmap(path, np.uint8, "r", 8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}, and only BF16 is read")
            begin, end = entry["data_offsets"]
            yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def target(name: str, taps: list[int]) -> str:
    """The GGUF name of a checkpoint's tensor; `taps` are the layers that Qwen's mergers read."""
    base, suffix = name.rsplit(".", 1)
    parts = base.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    tail = base.split(f".{number}.", 1)[-1] if number else ""
    if "deepstack_merger_list" in base:
        return f"v.deepstack.{taps[int(number)]}.{tail.replace('linear_', '')}.{suffix}"
    if number:
        vision = "vision_model" in base or "visual" in base
        return f"{'v.' if vision else ''}blk.{number}.{(TOWER if vision else TEXT)[tail]}.{suffix}"
    return next(f"{new}.{suffix}" for old, new in WHOLE.items() if base.endswith(old))


def widen(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """One tensor: matrices of `kind`, everything else in float32."""
    if values.ndim != 2 or "position_embd" in name:
        writer.add_tensor(name, widen(values))
    elif kind == "bf16":
        raw = np.ascontiguousarray(values).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif kind == "f16":
        writer.add_tensor(name, widen(values).astype(np.float16))
    else:
        coded = gguf.quants.quantize(widen(values), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, coded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def add_vocabulary(writer: gguf.GGUFWriter, model_type: str, size: int) -> None:
    """The made-up vocabulary, `size` tokens of it."""
    kinds = [gguf.TokenType.NORMAL] * size
    for i in vocabulary.SPECIAL[model_type]:
        kinds[i] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if model_type == "qwen3_vl" else "smollm")
    writer.add_token_list(vocabulary.words(model_type, size))
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{vocabulary.BREAK} {vocabulary.BREAK}"])
    writer.add_eos_token_id(size - 1)
    writer.add_bos_token_id(size - 2)
    writer.add_add_bos_token(False)


def text_writer(path: Path, config: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer with the facts of the decoder."""
    text, qwen = config["text_config"], config["model_type"] == "qwen3_vl"
    writer = gguf.GGUFWriter(path, "qwen3vl" if qwen else "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_rope_freq_base(float(text["rope_theta"]))
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if qwen:
        writer.add_rope_dimension_sections([*text["rope_scaling"]["mrope_section"], 0])
        writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))
    add_vocabulary(writer, config["model_type"], text["vocab_size"])
    return writer


def tower_writer(path: Path, config: dict[str, Any], processor: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer with the facts of the tower and of the picture's preparation."""
    vision, qwen = config["vision_config"], config["model_type"] == "qwen3_vl"
    writer = gguf.GGUFWriter(path, "clip")
    depth = vision["depth"] if qwen else vision["num_hidden_layers"]
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen3vl_merger" if qwen else "idefics3")
    writer.add_vision_use_gelu(True)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_block_count(depth)
    writer.add_vision_head_count(vision["num_heads" if qwen else "num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-6))
    writer.add_vision_image_mean(processor["image_mean"])
    writer.add_vision_image_std(processor["image_std"])
    if qwen:
        side = round(vision["num_position_embeddings"] ** 0.5) * vision["patch_size"]
        writer.add_vision_image_size(side)
        writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
        taps = vision["deepstack_visual_indexes"]
        writer.add_vision_is_deepstack_layers([i in taps for i in range(depth)])
    else:
        writer.add_vision_image_size(vision["image_size"])
        writer.add_vision_projector_scale_factor(config["scale_factor"])
        writer.add_vision_preproc_image_size(processor["size"]["longest_edge"])
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(folder: Path, out: Path, tower: str) -> None:
    """Write out/text-bf16.gguf and out/tower-<tower>.gguf where they are missing."""
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    taps = config["vision_config"].get("deepstack_visual_indexes", [])
    out.mkdir(parents=True, exist_ok=True)
    text_file, tower_file = out / "text-bf16.gguf", out / f"tower-{tower}.gguf"
    writers = {
        False: None if text_file.exists() else text_writer(text_file, config),
        True: None if tower_file.exists() else tower_writer(tower_file, config, processor),
    }
    for name, values in tensors(folder):
        new = target(name, taps)
        writer = writers[new.startswith(("v.", "mm."))]
        if writer is None:
            continue
        if values.ndim == 5:  # a convolution over two frames: one weight each
            add(writer, new, values[:, :, 0], tower)
            add(writer, f"{new}.1", values[:, :, 1], tower)
        else:
            add(writer, new, values, tower if new.startswith(("v.", "mm.")) else "bf16")
    for writer in writers.values():
        if writer is not None:
            finish(writer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tower", choices=["f16", "bf16", "q8_0"], default="f16")
    args = parser.parse_args()
    convert(args.checkpoint, args.out, args.tower)


if __name__ == "__main__":
    main()
