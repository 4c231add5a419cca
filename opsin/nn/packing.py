"""Packed matrices in the place of linear layers, filled as the checkpoint is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.checkpoint.safetensors import MappedFiles, StoredTensor
from opsin.checkpoint.weights import Sink
from opsin.kernels.packed import Packed
from opsin.nn.experts import ExpertLinear
from opsin.nn.late import LateMatrix
from opsin.nn.linear import Embedding, Linear
from opsin.quant.formats import Format
from opsin.quant.mlx import AffineTensor

ROWS = 16  # rows of one packed block
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (module, format, rows, columns) to an empty matrix
NewMatrix = Callable[[nn.Module, Format, int, int], Packed]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor that go to `row` of a matrix."""

    matrix: Packed
    row: int
    rows: int
    spread: int = 1


@dataclass(frozen=True, slots=True)
class PackedSink:
    """The rows of a tensor of `shape`, piece after piece, into packed matrices.

    filled: they hold their values already; in_place: they may read them where they lie.
    """

    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    filled: bool = False
    in_place: bool = False

    def read(self, tensor: StoredTensor, files: MappedFiles) -> bool:
        """Take rows where they lie or straight from the file, now or later, or codes as they
        are.
        """
        if isinstance(tensor, AffineTensor):
            return self._take_codes(tensor)
        if type(tensor) is not StoredTensor or tensor.dtype not in DTYPES:
            return False
        if self._wait(tensor, files) or self._map(tensor, files):
            return True
        with tensor.path.open("rb", buffering=0) as file:
            at = tensor.start
            for piece in self.pieces:
                taken = piece.matrix.fill_file(
                    file.fileno(), at, piece.rows, tensor.dtype, piece.row, piece.spread
                )
                if not taken:
                    return False
                at += piece.rows * self.shape[-1] * tensor.dtype.itemsize
        return True

    def _wait(self, tensor: StoredTensor, files: MappedFiles) -> bool:
        """Let matrices that wait for their first use read the tensor then; False if they do not."""
        at = tensor.start
        for piece in self.pieces:
            if not isinstance(piece.matrix, LateMatrix):
                return False
            file = files.opened_for(tensor)
            piece.matrix.wait_for(file, at, piece.rows, tensor.dtype, piece.row, piece.spread)
            at += piece.rows * self.shape[-1] * tensor.dtype.itemsize
        return True

    def _map(self, tensor: StoredTensor, files: MappedFiles) -> bool:
        """Let matrices of the tensor's type read it in place; False if that cannot be."""
        kinds = {piece.matrix.format.kind for piece in self.pieces}
        if not self.in_place or tensor.dtype != torch.bfloat16 or kinds != {"bf16"}:
            return False
        memory = files.of(tensor)
        if memory is None:
            return False
        self._put(memory, in_place=True)
        return True

    def _take_codes(self, tensor: AffineTensor) -> bool:
        if any(not tensor.fits(piece.matrix.format) for piece in self.pieces):
            return False
        parts = [x.flatten(0, -2) for x in tensor.parts()]  # codes, scales, biases
        at = 0
        for piece in self.pieces:
            codes, scales, biases = (x[at : at + piece.rows] for x in parts)
            piece.matrix.fill_affine(
                codes, scales, biases, tensor.bits, piece.row, spread=piece.spread
            )
            at += piece.rows
        return True

    def fill(self, values: Tensor) -> None:
        """Take values of the sink's shape."""
        self._put(values, in_place=False)

    def _put(self, values: Tensor, *, in_place: bool) -> None:
        rows, at = values.reshape(-1, self.shape[-1]), 0
        for piece in self.pieces:
            part = rows[at : at + piece.rows]
            if not (in_place and piece.matrix.map(part, piece.row, spread=piece.spread)):
                piece.matrix.fill(part, piece.row, spread=piece.spread)
            at += piece.rows


class ModulePacker:
    """Gives the modules that it has a format for packed matrices as their first tensor comes.

    `formats` says how each module's weight is kept; `interleaved` are those whose two outputs
    alternate by sixteen rows; `new` makes an empty matrix; `nothing` is an empty tensor of the
    model's dtype, on its device; `kept` are the modules' matrices that hold their values already;
    `in_place` says whether matrices may read their values where the checkpoint's files have them;
    the `joined` are packed only where their rows come from several tensors.
    """

    def __init__(
        self,
        formats: Mapping[nn.Module, Format],
        new: NewMatrix,
        nothing: Tensor,
        *,
        interleaved: frozenset[nn.Module] = frozenset(),
        kept: Mapping[nn.Module, Sequence[Packed]] | None = None,
        in_place: bool = False,
        joined: frozenset[nn.Module] = frozenset(),
    ) -> None:
        self.joined = joined
        self.formats = formats
        self.kept = kept or {}
        self.in_place = in_place
        self.interleaved = interleaved
        self.new = new
        self.nothing = nothing

    def sink(
        self, module: nn.Module, name: str, index: tuple[int, ...], tensor: StoredTensor
    ) -> Sink | None:
        """What takes the part `index` of a module's weight; None for what stays as it is."""
        form = self.formats.get(module)
        if form is None or name != "weight" or (module in self.joined and not index):
            return None
        if isinstance(module, ExpertLinear):
            return self._experts(module, form, index)
        if isinstance(module, Embedding):
            matrix = module.packed or self._matrices(module, form, 1)[0]
            module.pack(matrix, self.nothing)
            first, rows = 0, matrix.n
            if index:
                first, rows = sum(module.splits[: index[0]]), module.splits[index[0]]
            pieces = [Piece(matrix, first, rows)]
            return PackedSink((rows, matrix.k), pieces, module in self.kept, self.in_place)
        assert isinstance(module, Linear)
        return self._linear(module, form, index)

    def _matrices(self, module: nn.Module, form: Format, count: int) -> Sequence[Packed]:
        """A module's matrices: those that are kept, or as many new ones."""
        if module in self.kept:
            return self.kept[module]
        shape = module.get_parameter("weight").shape[-2:]
        return [self.new(module, form, *shape) for _ in range(count)]

    def _linear(self, module: Linear, form: Format, index: tuple[int, ...]) -> Sink:
        matrix, splits = module.packed or self._matrices(module, form, 1)[0], module.splits
        module.pack(matrix, self.nothing)
        rows = sum(splits)
        if module in self.interleaved:
            pieces = [Piece(matrix, ROWS * i, rows // 2, 2) for i in (0, 1)]
            pieces = pieces[index[0] : index[0] + 1] if index else pieces
        else:
            start, rows = (sum(splits[: index[0]]), splits[index[0]]) if index else (0, rows)
            pieces = [Piece(matrix, start, rows)]
        rows = sum(piece.rows for piece in pieces)
        return PackedSink((rows, matrix.k), pieces, module in self.kept, self.in_place)

    def _experts(self, module: ExpertLinear, form: Format, index: tuple[int, ...]) -> Sink:
        if not module.packed:
            module.pack(self._matrices(module, form, len(module.weight)), self.nothing)
        splits, columns = module.splits, module.packed[0].k
        start, rows = (sum(splits[: index[0]]), splits[index[0]]) if index else (0, sum(splits))
        filled = module in self.kept
        if len(index) > 1:
            pieces = [Piece(module.packed[index[1]], start, rows)]
            return PackedSink((rows, columns), pieces, filled, self.in_place)
        pieces = [Piece(matrix, start, rows) for matrix in module.packed]
        return PackedSink((len(pieces), rows, columns), pieces, filled, self.in_place)

    def finish(self) -> None:
        """Hand the biases over too, when every tensor is in place."""
        for module in self.formats:
            if isinstance(module, Linear):
                module.pack_bias(spread=2 if module in self.interleaved else 1)
