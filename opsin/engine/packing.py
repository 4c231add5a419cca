"""Which of a model's matrices are packed as they are loaded, and how."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import MAP_BYTES, Rename, target_of
from opsin.decoder.attention import Attention
from opsin.decoder.decoder import Decoder
from opsin.decoder.mlp import GatedMLP, PlainMLP
from opsin.kernels.cpu.library import Library
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.packed import DenseMatrix, Packed, PlainMatrix
from opsin.nn.experts import ExpertLinear
from opsin.nn.late import LateMatrix
from opsin.nn.linear import Adapter, Embedding, Linear
from opsin.nn.packing import ModulePacker
from opsin.quant.formats import GROUPS, Format, Kind, quantised, quantised_by_rows
from opsin.quant.mlx import AffineTensor
from opsin.quant.recipes import has_more_bits
from opsin.towers.mobilenet_v5 import MobileNetV5

SCALES = (torch.float16, torch.bfloat16)
# Matrices in bfloat16 that take less than this together are copied to huge pages, from which small
# models decode a tenth faster, in well under a second; larger ones are read in place, unless they
# are kept in fewer bits.
IN_PLACE_LEAST = 512 << 20  # bytes
# They are where processors are seen to read fewer bits sooner, and caches do not hold them anyway.
LOSSLESS_SETS = ("avx512-bf16",)
LOSSLESS_LEAST = 64 << 20  # bytes
LOSSLESS_COLUMNS = 64  # or a multiple of it
LEAST_ROWS = 64  # smaller outputs (gates, scores) stay as they are: they cost nothing
BF16, BF13 = Format("bf16"), Format("bf13")
Formats = dict[nn.Module, Format]


def native_formats(decoder: Decoder) -> Formats:
    """Every matrix that the native stack reads, in bfloat16."""
    formats: Formats = {m: BF16 for m in decoder.layers.modules() if isinstance(m, Linear)}
    formats[decoder.embedding if decoder.head is None else decoder.head] = BF16
    return formats


def plain_bytes(formats: Formats) -> int:
    """What the matrices in bfloat16 as it is take."""
    return sum(2 * m.get_parameter("weight").numel() for m, f in formats.items() if f == BF16)


def are_in_place(formats: Formats) -> bool:
    """Whether matrices in bfloat16 as it is are read where the checkpoint's files have them."""
    return plain_bytes(formats) >= IN_PLACE_LEAST


def quantised_formats(decoder: Decoder, towers: nn.Module, bits: int) -> Formats:
    """What is quantised for so many bits while loading.

    Decoder layers and experts take `bits`. Where these are 4, 5 go to what is most sensitive for
    what it weighs: the first and the last layer, what makes queries, keys and values, and, in the
    layers that mixed recipes give more to, what ends a feed-forward block (not experts). The
    embeddings and the head, a large part of a small model, take `bits`, 4 of them in groups of 32.
    The tables of a layer's own inputs take 8, and so do the towers, whose time is all arithmetic:
    they have one scale a row, so that whole numbers are added over all columns.
    Everything else stays as it is: norms, routers, convolutions, adapters, tables of positions, the
    first layer over a picture's patches, and outputs of fewer than 64 features.
    """
    narrow: Kind = "q4" if bits == 4 else "q8"
    wide: Kind = "q5" if bits == 4 else "q8"
    wanted: list[tuple[nn.Module, Kind]] = []
    for i, layer in enumerate(decoder.layers):
        inner = 0 < i < len(decoder.layers) - 1
        sensitive = {block.qkv for block in layer.modules() if isinstance(block, Attention)}
        if has_more_bits(i, len(decoder.layers)):
            blocks = (b for b in layer.modules() if isinstance(b, GatedMLP | PlainMLP))
            sensitive |= {block.down for block in blocks}
        for module in _matrices(layer):
            wanted.append((module, narrow if inner and module not in sensitive else wide))
    tables = [decoder.embedding] if decoder.head is None else [decoder.embedding, decoder.head]
    wanted += [(table, narrow) for table in tables]
    if decoder.layer_inputs is not None:
        own = decoder.layer_inputs
        wanted += [(module, "q8") for module in (own.table, own.project)]
    formats: Formats = {}
    for module in _matrices(towers):
        weight = module.get_parameter("weight")
        if weight.shape[-2] >= LEAST_ROWS:
            formats[module] = quantised_by_rows(weight.shape[-1])
    for module, kind in wanted:
        weight = module.get_parameter("weight")
        if weight.shape[-2] >= LEAST_ROWS:
            most = 32 if kind == "q4" and module in tables else None
            formats[module] = quantised(kind, weight.shape[-1], most)
    return formats


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers and experts, without adapters and first layers over patches.

    Nor a convolutional tower's: what is a linear layer there is a 1x1 convolution, and the whole of
    its error at 8 bits came from these.
    """
    for name, child in module.named_children():
        if isinstance(child, Linear | ExpertLinear) and name != "patch":
            yield child
        if not isinstance(child, Adapter | MobileNetV5):
            yield from _matrices(child)


def stored_formats(
    model: nn.Module, tensors: Iterable[StoredTensor], rules: Sequence[Rename]
) -> Formats:
    """The formats that take a quantised checkpoint's codes as they are.

    A matrix whose parts are stored in ways that no one format takes is left out: it is read as the
    16-bit weights that its codes stand for.
    """
    parts: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        parts[target_of(tensor.name, rules).base].append(tensor)
    formats: Formats = {}
    for name, module in model.named_modules():
        stored = parts.get(f"{name}.weight", [])
        if not stored or not isinstance(module, Linear | ExpertLinear | Embedding):
            continue
        affine = [tensor for tensor in stored if isinstance(tensor, AffineTensor)]
        if len(affine) < len(stored):
            continue
        widest = max(affine, key=lambda tensor: tensor.bits).format
        packable = widest.group in GROUPS and widest.scale_dtype in SCALES
        if packable and all(tensor.fits(widest) for tensor in affine):
            formats[module] = widest
    return formats


@dataclass(frozen=True, slots=True)
class Summary:
    """How much of a model is kept how: bytes in memory, and parameters by kind."""

    num_bytes: int
    parameters: dict[str, int]


def summary(model: nn.Module, formats: Formats, dtype: torch.dtype) -> Summary:
    """What a model whose parameters have no memory yet will take."""
    kept = {module.get_parameter("weight"): form for module, form in formats.items()}
    total, parameters = 0.0, defaultdict[str, int](int)
    for parameter in model.parameters():
        form = kept.get(parameter)
        name = str(dtype).removeprefix("torch.") if form is None else form.kind
        parameters[name] += parameter.numel()
        bits = 8 * dtype.itemsize if form is None else form.bits
        total += parameter.numel() * bits / 8
    return Summary(int(total), dict(parameters))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model's matrices are packed.

    formats: which, and how each is kept; library: what packs them, plain torch where it is None;
    nothing: an empty tensor of the model's dtype on its device; interleaved: the modules whose gate
    and up rows alternate as the native stack reads them; late: those whose values are read at their
    first use, if they are packed; joined: those that are not, but whose rows are brought together
    from several tensors then.
    """

    formats: Formats
    library: Library | None
    nothing: Tensor
    interleaved: frozenset[nn.Module] = frozenset()
    late: frozenset[nn.Module] = frozenset()
    joined: frozenset[nn.Module] = frozenset()


def lossless(recipe: Recipe) -> Recipe:
    """The same, with matrices in bfloat16 in thirteen bits, where that saves time.

    Products of few rows take as long as reading the weights, and these are the same weights.
    """
    slower = recipe.library is None or recipe.library.isa not in LOSSLESS_SETS
    if slower or plain_bytes(recipe.formats) < LOSSLESS_LEAST:
        return recipe
    plain = {m: m.get_parameter("weight") for m, f in recipe.formats.items() if f == BF16}
    fewer = {m: BF13 for m, w in plain.items() if w.shape[-1] % LOSSLESS_COLUMNS == 0}
    return replace(recipe, formats=recipe.formats | fewer)


def late_matrices(towers: nn.Module) -> frozenset[nn.Module]:
    """A tower's matrices on a CPU: with text alone none of them is used."""
    return frozenset(module for module in _matrices(towers) if isinstance(module, Linear))


def are_packed(towers: nn.Module, formats: Formats) -> bool:
    """Whether towers multiply by packed matrices, but for those of few outputs and first layers."""
    linear = [module for module in _matrices(towers) if isinstance(module, Linear)]
    large = [module for module in linear if sum(module.splits) >= LEAST_ROWS]
    return bool(large) and all(module in formats for module in large)


def joined_matrices(late: Iterable[nn.Module], formats: Formats) -> frozenset[nn.Module]:
    """Of late matrices those that are not packed, are large, and stand in more than one tensor."""
    return frozenset(
        module
        for module in late
        if isinstance(module, Linear)
        and module not in formats
        and len(module.splits) > 1
        and module.weight.numel() * BF16.bits / 8 >= MAP_BYTES
    )


def packer_of(recipe: Recipe, kept: Mapping[nn.Module, Sequence[Packed]]) -> ModulePacker:
    """What packs the matrices of a recipe, but for those `kept`, which hold their values."""

    def new(module: nn.Module, form: Format, rows: int, columns: int) -> Packed:
        if isinstance(module, Linear) and module in recipe.joined:
            return LateMatrix(DenseMatrix(module.kernels, rows, columns, recipe.nothing.dtype))
        if recipe.library is None:
            return PlainMatrix(form, rows, columns, recipe.nothing.device)
        matrix = PackedMatrix.empty(recipe.library, form, rows, columns)
        return LateMatrix(matrix) if module in recipe.late else matrix

    return ModulePacker(
        recipe.formats | dict.fromkeys(recipe.joined, BF16),
        new,
        recipe.nothing,
        interleaved=recipe.interleaved,
        kept=kept,
        in_place=are_in_place(recipe.formats),
        joined=recipe.joined,
    )
