"""The C structures and functions of the native library, field for field as src/api.h has them."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}


class Linear(ctypes.Structure):
    """OpsinLinear: one product and what becomes of its result."""

    _fields_ = (
        ("matrix", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("out_stride", c_int64),
        ("x_dtype", c_int32),
        ("out_dtype", c_int32),
        ("rows", c_int32),
        ("gated", c_int32),
        ("activation", c_int32),
        ("accumulate", c_int32),
        ("scale", c_float),
    )


class Layer(ctypes.Structure):
    """OpsinLayer: one decoder layer."""

    _fields_ = (
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("attention_norm", c_void_p),
        ("attention_norm_bias", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("after_attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_norm_bias", c_void_p),
        ("after_mlp_norm", c_void_p),
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("sinks", c_void_p),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("rope", c_int32),
        ("rotary_dim", c_int32),
        ("rope_interleaved", c_int32),
        ("window", c_int32),
        ("gated", c_int32),
        ("activation", c_int32),
        ("attention_scale", c_float),
        ("attention_softcap", c_float),
        ("residual_scale", c_float),
        ("kv_bits", c_int32),
        ("kv_groups", c_int32),
        ("reserved", c_int32),
    )


class Stack(ctypes.Structure):
    """OpsinStack: all layers, the final norm and the head."""

    _fields_ = (
        ("layers", c_void_p),
        ("final_norm", c_void_p),
        ("final_norm_bias", c_void_p),
        ("head", c_void_p),
        ("embedding", c_void_p),
        ("num_layers", c_int32),
        ("dim", c_int32),
        ("layer_norm", c_int32),
        ("norm_eps", c_float),
        ("logit_scale", c_float),
        ("logit_softcap", c_float),
        ("embedding_scale", c_float),
        ("reserved", c_int32),
    )


class RowAdd(ctypes.Structure):
    """OpsinRowAdd: values added to some rows after a layer."""

    _fields_ = (
        ("rows", c_void_p),
        ("values", c_void_p),
        ("layer", c_int32),
        ("count", c_int32),
    )


class Step(ctypes.Structure):
    """OpsinStep: the tokens of one step and where their keys lie."""

    _fields_ = (
        ("hidden", c_void_p),
        ("token_ids", c_void_p),
        ("query_start", c_void_p),
        ("num_keys", c_void_p),
        ("block_tables", c_void_p),
        ("visible_until", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rope_rows", c_void_p),
        ("adds", c_void_p),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("likeliest", c_void_p),
        ("normed", c_void_p),
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("max_blocks", c_int32),
        ("block_size", c_int32),
        ("first_layer", c_int32),
        ("last_layer", c_int32),
        ("num_logits", c_int32),
        ("num_adds", c_int32),
        ("early_blocks", c_int32),
        ("early_size", c_int32),
        ("kept_first", c_int32),
        ("kept_last", c_int32),
    )


class Attention(ctypes.Structure):
    """OpsinAttention: attention alone, over a paged cache or over plain rows."""

    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("out", c_void_p),
        ("query_start", c_void_p),
        ("num_keys", c_void_p),
        ("key_start", c_void_p),
        ("block_tables", c_void_p),
        ("visible_from", c_void_p),
        ("visible_until", c_void_p),
        ("sinks", c_void_p),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("out_stride", c_int64),
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("max_blocks", c_int32),
        ("block_size", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("value_dim", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("reserved", c_int32),
    )


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "opsin_abi": (c_int, ()),
    "opsin_init": (c_int, (c_char_p, c_int)),
    "opsin_isa": (c_char_p, ()),
    "opsin_threads": (c_int, ()),
    "opsin_set_threads": (c_int, (c_int,)),
    "opsin_aside": (c_int, (c_int,)),
    "opsin_isa_count": (c_int, ()),
    "opsin_isa_name": (c_char_p, (c_int,)),
    "opsin_matrix_new": (c_void_p, (c_int,) * 6),
    "opsin_matrix_fill_dense": (c_int, (c_void_p, *(c_int,) * 3, c_void_p, c_int, c_int64)),
    "opsin_matrix_map": (c_int, (c_void_p, *(c_int,) * 3, c_void_p)),
    "opsin_matrix_fill_file": (c_int, (c_void_p, *(c_int,) * 4, c_int64, c_int)),
    "opsin_matrix_fill_affine": (
        c_int,
        (c_void_p, *(c_int,) * 3, c_void_p, c_int, c_void_p, c_void_p),
    ),
    "opsin_matrix_fill_bias": (c_int, (c_void_p, *(c_int,) * 3, c_void_p)),
    "opsin_matrix_view": (c_void_p, (*(c_int,) * 5, c_void_p, c_int64, c_int)),
    "opsin_matrix_data": (c_void_p, (c_void_p,)),
    "opsin_matrix_free": (None, (c_void_p,)),
    "opsin_matrix_bytes": (c_int64, (c_void_p,)),
    "opsin_matrix_rows": (c_int, (c_void_p, c_void_p, c_int, c_int, c_void_p)),
    "opsin_linear": (c_int, (c_void_p,)),
    "opsin_attention": (c_int, (c_void_p,)),
    "opsin_norm": (
        c_int,
        (*(c_void_p,) * 4, c_int, c_float, c_int64, c_int, c_int, c_void_p, c_void_p),
    ),
    "opsin_activate": (c_int, (c_void_p, c_void_p, c_int, c_int64, c_int, c_void_p)),
    "opsin_rope": (c_int, (*(c_void_p,) * 3, *(c_int,) * 5, c_int64, c_int)),
    "opsin_argmax": (c_int64, (c_void_p, c_int64)),
    "opsin_softmax": (c_double, (c_void_p, c_int64, c_float, c_void_p)),
    "opsin_step": (c_int, (c_void_p, c_void_p)),
    "opsin_read_bandwidth": (c_double, (c_int64, c_int)),
    "opsin_peak": (c_double, (c_int, c_int)),
}


def abi_number() -> int:
    """What `opsin_abi` answers when these structures are those of the library."""
    sizes = ((Linear, 1), (Layer, 3), (Stack, 5), (Step, 7), (Attention, 11), (RowAdd, 13))
    return sum(ctypes.sizeof(structure) * factor for structure, factor in sizes) + 2
