"""Weight matrices as the native kernels read them, and products with them."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.errors import EngineError
from opsin.kernels.cpu import abi
from opsin.kernels.cpu.library import Library, pointer
from opsin.quant.formats import Format, Kind

_KINDS = {"bf16": 0, "q8": 1, "q4": 2, "q6": 3, "bf13": 4, "q5": 5}
_SCALES = {torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
ROWS, COLUMNS = 16, 32  # of bfloat16 in one block
SLACK = 4096  # bytes past its end that a matrix's memory has


@dataclass(frozen=True, slots=True)
class Region:
    """Readable memory at an address that is a multiple of 64, alive as long as its `owner`."""

    owner: object
    address: int
    num_bytes: int


class PackedMatrix:
    """A weight (n, k) in blocks of sixteen rows, in place of the tensor.

    Kinds: "bf16", row by row, where a checkpoint's own bytes may be read in place; "bf13", the same
    values in thirteen bits, where k is a multiple of 64 (and "bf16" after all, if few of its rows
    can be); "q8", "q6", "q5" and "q4", affine codes with a scale and bias per `group` columns (0:
    one a row, where k <= 65536), sixteen rows interleaved. Scales of torch.uint8 (not with "q8")
    are those of `Format`. Activations of quantised kinds are
    quantised to int8 per group; those of a `rotated` one, whose k is a multiple of 32, are mixed
    before as its columns were.
    """

    def __init__(
        self,
        library: Library,
        kind: Kind,
        n: int,
        k: int,
        *,
        group: int = 64,
        scale_dtype: torch.dtype = torch.float16,
        rotated: bool = False,
        kept: Region | None = None,
    ) -> None:
        shape = (_KINDS[kind], n, k, group, _SCALES[scale_dtype])
        if kept is None:
            handle = library.handle.opsin_matrix_new(*shape, rotated)
        else:
            region = (kept.address, kept.num_bytes)
            handle = library.handle.opsin_matrix_view(*shape, *region, rotated)
        if not handle:
            raise EngineError(
                f"a {kind} matrix of {n} x {k} in groups of {group} cannot be packed",
                why="columns must be whole groups of 32, 64 or a multiple of 64, and fit in memory"
                if kept is None
                else "its memory is of another size",
            )
        self.library = library
        self.handle: int = handle
        self.format = Format(kind, group, scale_dtype, rotated)
        self.n = n
        self.k = k
        self._kept = kept
        self._mapped: list[Tensor] = []
        self._free = weakref.finalize(self, library.handle.opsin_matrix_free, handle)

    @classmethod
    def dense(
        cls,
        library: Library,
        weight: Tensor,
        kind: Kind = "bf16",
        *,
        group: int = 64,
        rotated: bool = False,
        bias: Tensor | None = None,
    ) -> PackedMatrix:
        """Pack weight (n, k); quantised kinds take their scales from it."""
        packed = cls(library, kind, *weight.shape, group=group, rotated=rotated)
        packed.fill(weight)
        if bias is not None:
            packed.fill_bias(bias)
        return packed

    @classmethod
    def empty(cls, library: Library, form: Format, n: int, k: int) -> PackedMatrix:
        """A matrix of a format, to be filled."""
        return cls._of(library, form, n, k, None)

    @classmethod
    def view(cls, library: Library, form: Format, n: int, k: int, region: Region) -> PackedMatrix:
        """A quantised matrix whose packed bytes lie in a region; it cannot be filled.

        Raises EngineError for a region of another size than `region_bytes` of such a matrix.
        """
        return cls._of(library, form, n, k, region)

    @classmethod
    def _of(
        cls, library: Library, form: Format, n: int, k: int, kept: Region | None
    ) -> PackedMatrix:
        dtype, rotated = form.scale_dtype, form.rotated
        return cls(
            library, form.kind, n, k,
            group=form.group, scale_dtype=dtype, rotated=rotated, kept=kept,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return int(self.library.handle.opsin_matrix_bytes(self.handle))

    @property
    def is_view(self) -> bool:
        """Whether its memory is another's."""
        return self._kept is not None

    @property
    def is_in_place(self) -> bool:
        """Whether rows of it are read where a checkpoint's file holds them."""
        return bool(self._mapped)

    @property
    def region_bytes(self) -> int:
        """Bytes of the region that a view of the same matrix needs: products read past the end."""
        return self.nbytes + SLACK

    def memory(self) -> memoryview:
        """The packed bytes themselves, for as long as the matrix lives.

        Raises EngineError for a matrix in bfloat16 as it is, which need not lie in one place.
        """
        address = self.library.handle.opsin_matrix_data(self.handle)
        if not address:
            raise EngineError("a matrix is not packed", why="too much of it needs all its bits")
        return memoryview((ctypes.c_uint8 * self.nbytes).from_address(address)).cast("B")

    def fill(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put weight (rows, k) at `row`; spread 2 leaves every other sixteen rows for its pair."""
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        if weight.shape[1] != self.k:
            raise ValueError(f"rows have {weight.shape[1]} columns, not {self.k}")
        code = self.library.handle.opsin_matrix_fill_dense(
            self.handle, row, weight.shape[0], spread, pointer(weight), abi.DTYPES[weight.dtype],
            weight.stride(0),
        )  # fmt: skip
        self.library.check(code, "fill")

    def map(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> bool:
        """Read weight (rows, k) where it lies from now on, as `fill` would place it; False if not.

        A bf16 matrix whose k is a multiple of 32 can read bfloat16 rows that lie one after another
        so, from a `row` that is a multiple of 16; the last rows % 16 are copied.
        """
        if weight.shape[1] != self.k or not weight.is_contiguous():
            raise ValueError(f"rows must have {self.k} columns and lie one after another")
        whole = self.k % COLUMNS == 0 and row % ROWS == 0
        if self.format.kind != "bf16" or weight.dtype != torch.bfloat16 or not whole:
            return False
        code = self.library.handle.opsin_matrix_map(
            self.handle, row, weight.shape[0], spread, pointer(weight)
        )
        self.library.check(code, "map")
        self._mapped.append(weight)
        return True

    def fill_file(
        self, file: int, offset: int, rows: int, dtype: torch.dtype, row: int = 0, spread: int = 1
    ) -> bool:
        """Put rows from an open file, where they lie one after another from `offset` on; True."""
        code = self.library.handle.opsin_matrix_fill_file(
            self.handle, row, rows, spread, file, offset, abi.DTYPES[dtype]
        )
        self.library.check(code, "fill")
        return True

    def fill_affine(
        self,
        codes: Tensor,
        scales: Tensor,
        biases: Tensor,
        bits: int,
        row: int = 0,
        *,
        spread: int = 1,
    ) -> None:
        """Put MLX codes (rows, k * bits / 32) uint32 with scales and biases (rows, k / group)."""
        rows = codes.shape[0]
        if codes.shape[1] * 32 != self.k * bits or scales.shape != (
            rows,
            self.k // self.format.group,
        ):
            raise ValueError("codes, scales and biases do not fit the matrix")
        codes = codes.contiguous()
        scales, biases = (x.to(self.format.scale_dtype).contiguous() for x in (scales, biases))
        code = self.library.handle.opsin_matrix_fill_affine(
            self.handle, row, rows, spread, pointer(codes), bits, pointer(scales), pointer(biases)
        )
        self.library.check(code, "fill")

    def fill_bias(self, bias: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put the bias (rows,) that products add."""
        bias = bias.float().contiguous()
        code = self.library.handle.opsin_matrix_fill_bias(
            self.handle, row, bias.numel(), spread, pointer(bias)
        )
        self.library.check(code, "fill")

    def multiply(
        self,
        x: Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        gated: bool = False,
        activation: str | None = None,
    ) -> Tensor:
        """x (rows, k) times the transpose, plus the bias: (rows, n) in x's dtype.

        `gated`: rows of gate and up alternate by sixteen; act(gate) * up, (rows, n / 2).
        """
        if x.dtype == torch.float16:  # which the kernels do not read
            wide = self.multiply(x.float(), gated=gated, activation=activation)
            return wide.to(out_dtype or x.dtype)
        x = x if x.stride(-1) == 1 else x.contiguous()
        if x.ndim != 2 or x.shape[1] != self.k:
            raise ValueError(f"x must be (rows, {self.k})")
        width = self.n // 2 if gated else self.n
        out = x.new_empty(x.shape[0], width, dtype=out_dtype or x.dtype)
        call = abi.Linear(
            matrix=self.handle, x=pointer(x), out=pointer(out), x_stride=x.stride(0),
            out_stride=width, x_dtype=abi.DTYPES[x.dtype], out_dtype=abi.DTYPES[out.dtype],
            rows=x.shape[0], gated=gated, accumulate=0, scale=1.0,
            activation=-1 if activation is None else abi.ACTIVATIONS[activation],
        )  # fmt: skip
        self.library.check(self.library.handle.opsin_linear(ctypes.byref(call)), "linear")
        return out

    def rows(self, indices: Tensor | Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows as an embedding: (count, k)."""
        if dtype == torch.float16:
            return self.rows(indices, torch.float32).to(dtype)
        wanted = array("q", indices.tolist() if isinstance(indices, Tensor) else indices)
        out = torch.empty(len(wanted), self.k, dtype=dtype)
        code = self.library.handle.opsin_matrix_rows(
            self.handle, wanted.buffer_info()[0], len(wanted), abi.DTYPES[dtype], pointer(out)
        )
        self.library.check(code, "rows")
        return out
