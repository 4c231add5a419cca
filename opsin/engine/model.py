"""A loaded model: family, decoder and towers of one checkpoint, on one device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from opsin import families, kernels
from opsin.checkpoint import weights
from opsin.checkpoint.adapters import adapter_tensors
from opsin.checkpoint.config import Config, read_config, read_json, read_processor_config
from opsin.checkpoint.safetensors import StoredTensor
from opsin.config import keeps_unasked, repacked_folder, settings
from opsin.decoder.decoder import Decoder
from opsin.decoder.native import NativeStack, gate_up_layers, why_not
from opsin.engine.limits import EngineLimits
from opsin.engine.memory import give_back_startup
from opsin.engine.packing import (
    Formats,
    Recipe,
    are_in_place,
    are_packed,
    joined_matrices,
    late_matrices,
    lossless,
    native_formats,
    packer_of,
    quantised_formats,
    stored_formats,
)
from opsin.engine.repacking import RepackedCache, is_kept
from opsin.errors import CheckpointError, InputError, MissingDependency
from opsin.families.base import Family
from opsin.kernels import cpu
from opsin.kernels.cpu.library import Library
from opsin.quant import mlx
from opsin.quant.formats import check_bits

LOG = logging.getLogger("opsin")
# Threads: on two, a tower and a step beside each other get no more done than in turn.
LEAST_SHARED = 4
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@runtime_checkable
class FinishesLoading(Protocol):
    """A module with work to do once all its weights are in place."""

    def finish_loading(self) -> None:
        """Derive what depends on the loaded weights."""
        ...


class Model(nn.Module):
    """The weights of one checkpoint, and the family that knows what they mean.

    `config` is the checkpoint's config.json; `decoder` and `towers` hold the parameters.
    """

    def __init__(self, family: Family, config: Config, arithmetic: kernels.Kernels) -> None:
        super().__init__()
        self.family = family
        self.config = config
        self.arithmetic = arithmetic
        self.decoder = Decoder(arithmetic, family.decoder())
        self.towers = family.towers(arithmetic)
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters())
        self.shared_library: Library | None = None  # see library_to_share
        self.engine: Any = None  # the one that serves `opsin.generate`, made on first use
        self.limits = EngineLimits()  # that engine's, where a call does not say otherwise
        self.processor: Any = None  # the one that was loaded with it

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.decoder.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that are not quantised."""
        return self.decoder.embedding.weight.dtype


def pick_device(name: str | None) -> torch.device:
    """The device of a name ("cpu", "cuda", "cuda:1", "mps"), or the best there is for None.

    Raises InputError for a name that means nothing and MissingDependency for a device that is not
    there.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"Unknown device {name!r}", remedy="Use cpu, cuda, cuda:N or mps", param="device"
        ) from error
    usable = {"cpu": True, "cuda": torch.cuda.is_available()}
    usable["mps"] = torch.backends.mps.is_available()
    if not usable.get(device.type, False):
        raise MissingDependency(
            f"Device {name!r} is not available",
            why="this installation of torch sees no such device",
            remedy="`opsin doctor` says what this machine offers",
            param="device",
        )
    return device


def pick_dtype(name: str | None, config: Config, tensors: list[StoredTensor]) -> torch.dtype:
    """The type to compute in: as asked, else as the config says, else as the weights are stored."""
    text = config.get("text_config") or {}
    stated = name or config.get("dtype") or config.get("torch_dtype")
    stated = stated or text.get("dtype") or text.get("torch_dtype")
    if stated in DTYPES:
        return DTYPES[stated]
    if name is not None:
        raise InputError(
            f"Unknown dtype {name!r}", remedy=f"Use one of {', '.join(DTYPES)}", param="dtype"
        )
    floating = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
    return max(set(floating), key=floating.count) if floating else torch.float32


def build(folder: Path) -> Model:
    """The model of a checkpoint folder with its parameters on the meta device: shapes, no
    memory.
    """
    config = read_config(folder)
    family = families.load(config, read_processor_config(folder))
    family.inspect(stored_weights(folder, config, family))
    with torch.device("meta"):
        return Model(family, config, kernels.select(torch.device("cpu")))


def load_model(
    folder: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    matformer_config: str | None = None,
    matformer_slice: str | None = None,
    quantize: int | None = None,
    repacked_cache: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Read a checkpoint folder into memory, tensor by tensor.

    `quantize`, 8 or 4, is the bits that matrices are quantised to as they are read.
    `matformer_slice` names one of the smaller models within a nested one, `matformer_config` a CSV
    file of them in place of the family's own. `repacked_cache` is where the packed weights are kept
    to be mapped next time: "auto", "on", "off" or a folder (`opsin.config.repacked_folder`).
    `on_progress` is called with the bytes read so far and the bytes there are. Peak memory is the
    model's own and one tensor. Raises CheckpointError for a folder that does not hold what its
    config.json says, InputError for what cannot be meant.
    """
    check_bits(quantize)
    give_back_startup()  # before the weights, so that the two are never in memory together
    place = pick_device(device)
    config = read_config(folder)
    family = families.load(config, read_processor_config(folder))
    if matformer_slice is not None or matformer_config is not None:
        take_slice(family, matformer_slice, matformer_config)
    tensors = stored_weights(folder, config, family)
    family.inspect(tensors)
    family.read_generation(read_json(folder / "generation_config.json"))
    library = native_library() if place.type == "cpu" else None
    with torch.device("meta"):
        model = Model(family, config, kernels.select(place, library))
    refuse_lost_adapters(folder, family, model.decoder)
    kind = pick_dtype(dtype, config, tensors)
    if place.type == "cuda" and kind == torch.float32:
        # By default cuDNN rounds the factors of float32 convolutions to 10 bits (TF32).
        torch.backends.cudnn.allow_tf32 = False
    native = None if why_not_native(model.decoder, place, kind) else library
    nothing = torch.empty(0, dtype=kind, device=place)
    recipe = pick_recipe(model, tensors, quantize, nothing, library, native)
    if library is None and place.type == "cpu" and (kind == torch.bfloat16 or recipe.formats):
        LOG.warning(
            "no native CPU kernels (%s): decoding is several times slower", cpu.why_missing()
        )
    recipe, cache = recipe_and_cache(repacked_cache, folder, model, recipe, tensors)
    kept = {} if cache is None else cache.read()
    packer = packer_of(recipe, kept)
    weights.assign(
        model,
        counted(tensors, on_progress),
        family.rename,
        family.ignored,
        dtype=kind,
        device=place,
        packer=packer,
    )
    for module in model.modules():
        if isinstance(module, FinishesLoading):
            module.finish_loading()
    packer.finish()
    family.connect(model.decoder, model.towers)
    if native is not None:
        model.decoder.native = NativeStack(native, model.decoder)
        model.shared_library = library_to_share(native, model, recipe.formats)
    give_back_startup()
    if cache is not None and not kept:
        cache.keep()
    return model.eval()


def stored_weights(folder: Path, config: Config, family: Family) -> list[StoredTensor]:
    """Every tensor of a checkpoint folder as its family takes it.

    What is quantised is brought together, and adapters beside the weights are among them.
    """
    tensors = list(weights.all_tensors(weights.weight_files(folder)))
    adapters = adapter_tensors(folder, family.adapter_folders if family.adapters_beside else {})
    whole = [*mlx.grouped(tensors, config.get("quantization")), *adapters]
    return [part for tensor in whole for part in family.apart(family.sliced(tensor))]


def take_slice(family: Family, name: str | None, table: str | None) -> None:
    """Make a family one of the smaller models within it, as a table of them describes it."""
    if name is None:
        raise InputError(
            "matformer_config says which slices there are, but not which to load",
            remedy="Name one with matformer_slice",
            param="matformer_slice",
        )
    family.take_slice(name, None if table is None else Path(table))


def refuse_lost_adapters(folder: Path, family: Family, decoder: Decoder) -> None:
    """Raise CheckpointError if a folder holds adapters that the model does not have."""
    stated = sorted([*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")])
    read = family.adapter_folders if decoder.config.adapters else {}
    lost = [path for path in stated if path.parent == folder or path.parent.name not in read]
    if lost:
        raise CheckpointError(
            f"The adapters of the checkpoint {folder.name} would be lost",
            why=f"{lost[0].relative_to(folder)} describes one that is none of the model's own",
            remedy="Use the authors' layout, or merge them into the weights",
        )


def why_not_native(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> str:
    """Why a decoder does not run on the native stack, as a clause; empty if it does."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"it is in {str(dtype).removeprefix('torch.')} on {device}"
    return why_not(decoder.config)


def native_library() -> Library | None:
    """The native kernels as the settings ask for them; None where they lack."""
    return cpu.load(settings().cpu_isa or "auto", settings().num_threads)


def pick_formats(model: Model, tensors: list[StoredTensor], quantize: int | None) -> Formats:
    """Which matrices are kept quantised: as asked, or else as the checkpoint stores them.

    Raises InputError for bits that nothing is quantised to, or a checkpoint that is quantised.
    """
    check_bits(quantize)
    if quantize is None:
        return stored_formats(model, tensors, model.family.rename)
    if any(isinstance(tensor, mlx.AffineTensor) for tensor in tensors):
        raise InputError(
            "The checkpoint is quantised already",
            remedy="Leave out the bits to quantise to, or name the model it was made from",
            param="quant",
        )
    return quantised_formats(model.decoder, model.towers, quantize)


def pick_recipe(
    model: Model,
    tensors: list[StoredTensor],
    quantize: int | None,
    nothing: Tensor,
    library: Library | None,
    native: Library | None,
) -> Recipe:
    """How a model's matrices are packed by a library: for the native stack, quantised, or both."""
    formats = {} if native is None else native_formats(model.decoder)
    formats |= pick_formats(model, tensors, quantize)
    alternating = frozenset[nn.Module]() if native is None else gate_up_layers(model.decoder)
    late = late_matrices(model.towers) if nothing.device.type == "cpu" else frozenset()
    joined = joined_matrices(late, formats) if nothing.dtype == torch.bfloat16 else frozenset()
    return Recipe(formats, library, nothing, alternating, late, joined)


def library_to_share(library: Library, model: Model, formats: Formats) -> Library | None:
    """The library whose threads towers and the native stack share, each at work with some of them;
    None where the towers' products are not its own, or there are too few threads to gain by it.
    """
    own = model.arithmetic.has_native_products or are_packed(model.towers, formats)
    return library if own and library.threads >= LEAST_SHARED else None


def recipe_and_cache(
    named: str | Path | None,
    folder: Path,
    model: Model,
    recipe: Recipe,
    tensors: list[StoredTensor],
) -> tuple[Recipe, RepackedCache | None]:
    """How matrices are packed in the end, and where they are kept; None where they are not.

    Those in bfloat16 are so in fewer bits where that takes little time, or is done once for all.
    """
    fewer = lossless(recipe)
    cache = cache_of(named, folder, model, fewer, tensors)
    kept = cache is not None and cache.will_keep()
    if fewer is recipe or kept or not are_in_place(recipe.formats):
        return fewer, cache
    return recipe, cache_of(named, folder, model, recipe, tensors)


def cache_of(
    named: str | Path | None,
    folder: Path,
    model: Model,
    recipe: Recipe,
    tensors: list[StoredTensor],
) -> RepackedCache | None:
    """Where the packed weights of a checkpoint folder are kept; None where they are not."""
    where = repacked_folder(named)
    if where is None:
        return None
    unasked = keeps_unasked(named)
    if recipe.library is None or not any(map(is_kept, recipe.formats.values())):
        if not unasked:
            LOG.warning("nothing of this model is packed here: none of it is kept in %s", where)
        return None
    rules = model.family.rename
    return RepackedCache.of(where, folder, model, recipe, tensors, rules, unasked=unasked)


def counted(
    tensors: list[StoredTensor], on_progress: Callable[[int, int], None] | None
) -> Iterator[StoredTensor]:
    """The tensors, with their bytes counted as they are taken."""
    total, done = sum(tensor.num_bytes for tensor in tensors), 0
    for tensor in tensors:
        yield tensor
        done += tensor.num_bytes
        if on_progress is not None:
            on_progress(done, total)


def describe(model: Model) -> dict[str, Any]:
    """What a model is, for `opsin models inspect` and the server's model list."""
    return {
        "model_type": model.config.model_type,
        "modalities": ["text", *model.family.modalities],
        "parameters": model.num_parameters,
        "max_positions": model.decoder.config.max_positions,
    }
