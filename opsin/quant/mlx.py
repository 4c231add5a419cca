"""Checkpoints whose weights are stored as affine groups, in the layout of MLX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsin.checkpoint.safetensors import StoredTensor
from opsin.errors import CheckpointError
from opsin.quant.affine import dequantise, unpack_codes
from opsin.quant.formats import WIDTHS, Format, Kind

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class AffineTensor(StoredTensor):
    """A weight of `shape` stored as three tensors: codes in 32-bit words, scales and biases."""

    codes: StoredTensor
    scales: StoredTensor
    biases: StoredTensor
    bits: int
    group: int

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.codes.num_bytes + self.scales.num_bytes + self.biases.num_bytes

    @property
    def format(self) -> Format:
        """The format that takes the codes as they are."""
        kinds: tuple[Kind, ...] = ("q4", "q5", "q6", "q8")
        kind = next(kind for kind in kinds if self.bits <= WIDTHS[kind])
        return Format(kind, self.group, self.dtype)

    def fits(self, form: Format) -> bool:
        """Whether a matrix of a format takes the codes as they are."""
        same = (self.group, self.dtype, False) == (form.group, form.scale_dtype, form.rotated)
        return not form.is_bfloat16 and self.bits <= WIDTHS[form.kind] and same

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and biases as stored."""
        return self.codes.read(), self.scales.read(), self.biases.read()

    def read_into(self, out: Tensor) -> None:
        """Fill `out`, of the same number of elements, with the weights that the codes stand for."""
        codes, scales, biases = (x.flatten(0, -2) for x in self.parts())
        whole = dequantise(unpack_codes(codes, self.bits, self.shape[-1]), scales, biases)
        out.copy_(whole.view(out.shape))

    def read(self) -> Tensor:
        """The weights that the codes stand for."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out


def band(tensor: StoredTensor, first: int, end: int) -> StoredTensor:
    """Whole rows of a stored matrix; where it is stored in groups, as its codes."""
    shape = (end - first, *tensor.shape[1:])
    if not isinstance(tensor, AffineTensor):
        assert type(tensor) is StoredTensor, "its rows do not lie one after another"
        row = math.prod(shape[1:]) * tensor.dtype.itemsize
        return StoredTensor(
            tensor.name, tensor.dtype, shape, tensor.path, tensor.start + first * row
        )
    codes, scales, biases = (
        band(part, first, end) for part in (tensor.codes, tensor.scales, tensor.biases)
    )
    return replace(tensor, shape=shape, codes=codes, scales=scales, biases=biases)


def grouped(
    tensors: Sequence[StoredTensor], config: Mapping[str, Any] | None
) -> list[StoredTensor]:
    """The tensors of a checkpoint with codes, scales and biases brought together.

    `config` is the "quantization" of config.json: group_size and bits, and under a layer's name
    others for that layer. Raises CheckpointError where they do not fit the tensors.
    """
    if not config:
        return list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    out: list[StoredTensor] = []
    for tensor in tensors:
        layer, _, kind = tensor.name.rpartition(".")
        companions = [by_name.get(f"{layer}.{name}") for name in ("weight", "scales", "biases")]
        codes, scales, biases = companions
        if codes is None or scales is None or codes.dtype != torch.uint32:
            out.append(tensor)
        elif kind == "weight":
            if biases is None:
                raise _unfit(layer, "it has scales and no biases")
            out.append(_affine(layer, codes, scales, biases, config))
        elif kind not in ("scales", "biases"):
            out.append(tensor)
    return out


def _affine(
    layer: str,
    codes: StoredTensor,
    scales: StoredTensor,
    biases: StoredTensor,
    config: Mapping[str, Any],
) -> AffineTensor:
    own = config.get(layer)
    stated = {**config, **own} if isinstance(own, Mapping) else config
    bits, group = stated.get("bits"), stated.get("group_size")
    if stated.get("mode", "affine") != "affine":
        raise _unfit(layer, f"its mode {stated['mode']!r} is not affine")
    if bits not in BITS or not isinstance(group, int) or group < 1:
        raise _unfit(layer, f"config.json states {bits} bits in groups of {group}")
    columns = codes.shape[-1] * 32 // bits
    shape = (*codes.shape[:-1], columns)
    fits = codes.shape[-1] * 32 == columns * bits
    if not fits or scales.shape != biases.shape or scales.shape != (*shape[:-1], columns // group):
        raise _unfit(
            layer,
            f"codes {list(codes.shape)} and scales {list(scales.shape)} are not {bits} bits "
            f"in groups of {group}",
        )
    return AffineTensor(
        codes.name, scales.dtype, shape, codes.path, codes.start, codes, scales, biases, bits, group
    )


def _unfit(layer: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"The quantised layer {layer} cannot be read",
        why=why,
        remedy="Check that config.json and the weights come from the same model",
    )
