"""What the native kernels do better than torch for models that are not one native stack."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from opsin.kernels import onednn
from opsin.kernels.cpu.library import Library, Paged
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.interface import Activation, AttentionBatch, Kernels
from opsin.kernels.packed_rows import CacheRows

LEAST_WEIGHTS = 1 << 14  # a smaller product takes less than what leads to it
# Instruction sets for which oneDNN, where it knows bfloat16, makes the faster products.
BETTER_IN_ONEDNN = ("amx", "neon", "portable")


class NativeKernels(Kernels):
    """Torch, but for attention over the cache in bfloat16, and, where the instruction set is not
    one of BETTER_IN_ONEDNN, for products and a tower's attention.

    Without instructions for bfloat16 torch makes products several times slower in it than in
    float32.
    """

    name = "native"

    def __init__(self, library: Library) -> None:
        self.library = library
        better = library.isa in BETTER_IN_ONEDNN and onednn.is_supported()
        self.products = onednn.OneDnnKernels() if better else None
        self.has_native_products = not better
        self._batch: AttentionBatch | None = None
        self._paged: dict[tuple[int | None, int | None], Paged] = {}

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
    ) -> Tensor:
        """As the plain one, rounded once, at the end; the weight is read where it lies.

        Natively a row's result is the same bits whatever rows are beside it.
        """
        if self.products is not None:
            return self.products.linear(x, weight, bias, activation)
        small = weight.numel() < LEAST_WEIGHTS or x.ndim < 2
        if small or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            return super().linear(x, weight, bias, activation)
        matrix = PackedMatrix(self.library, "bf16", *weight.shape)
        weight = weight.contiguous()
        if not matrix.map(weight):
            matrix.fill(weight)
        if bias is not None:
            matrix.fill_bias(bias)
        rows = matrix.multiply(x.flatten(0, -2), activation=activation)
        return rows.unflatten(0, x.shape[:-1])

    def paged_attention(
        self,
        query: Tensor,
        keys: CacheRows,
        values: CacheRows,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """As the plain one; native where each token sees one range of keys that lie as they are.

        Then a token's result is the same bits in any chunk and beside any others.
        """
        one_range = batch.kept is None and batch.unseen is None
        if not (one_range and all(map(_is_native, (query, keys, values)))):
            return super().paged_attention(
                query, keys, values, batch,
                scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, chunk=chunk,
            )  # fmt: skip
        if batch is not self._batch:
            self._batch, self._paged = batch, {}
        if (window, chunk) not in self._paged:
            self._paged[window, chunk] = _paged(batch, window, chunk)
        paged = self._paged[window, chunk]
        cap = 0.0 if soft_cap is None else soft_cap
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        return self.library.paged_attention(
            query, keys, values, paged, scale=scale, softcap=cap, sinks=sinks
        )

    def dense_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        *,
        scale: float,
        bias: Tensor | None = None,
    ) -> Tensor:
        """As the plain one; natively a run's result is the same bits beside any others."""
        native = self.products is None and bias is None
        if not (native and all(map(_is_native, (query, key, value)))):
            return super().dense_attention(query, key, value, lengths, scale=scale, bias=bias)
        return self.library.dense_attention(query, key, value, lengths, scale=scale)


def _is_native(rows: CacheRows) -> bool:
    """Whether rows (count, heads, dim) are as the native attention reads them."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.bfloat16:
        return False
    return rows.stride()[1:] == (rows.shape[2], 1)


def _paged(batch: AttentionBatch, window: int | None, chunk: int | None) -> Paged:
    """Where the tokens of a batch stand, and the range of keys that each of them sees."""
    starts, contexts = batch.query_start, batch.context_lens
    pieces = zip(pairwise(starts), contexts, strict=True)
    runs = [torch.arange(context - (end - start), context) for (start, end), context in pieces]
    positions = torch.cat(runs)
    until = positions + 1 if batch.visible_until is None else batch.visible_until
    begin = torch.zeros_like(positions)
    if window is not None:
        begin = positions - window + 1
        if batch.visible_from is not None:
            begin = torch.minimum(begin, batch.visible_from)
    if chunk is not None:
        begin = torch.maximum(begin, positions // chunk * chunk)
    return Paged(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        batch.block_tables.to(torch.int32),
        batch.block_size,
        begin.clamp(min=0).to(torch.int32),
        until.to(torch.int32),
    )
