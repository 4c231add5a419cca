"""`opsin.quantize`: a checkpoint folder written anew, with quantised weights or without."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from opsin.checkpoint import hub, weights
from opsin.checkpoint.config import read_config, read_json
from opsin.checkpoint.safetensors import StoredTensor, stored_metadata
from opsin.checkpoint.shards import Shards
from opsin.checkpoint.weights import target_of
from opsin.decoder.attention import Attention
from opsin.engine.model import Model, build, refuse_lost_adapters
from opsin.engine.packing import quantised_formats
from opsin.errors import CheckpointError, InputError
from opsin.families.mlx_names import MLXNames
from opsin.nn.experts import ExpertLinear
from opsin.quant import mlx, recipes
from opsin.quant.recipes import Place
from opsin.quant.save import BF16, Output, quantization, write_all

STATED = ("quantization", "quantization_config")
FREE = re.compile(r"(LICENSE|LICENCE|NOTICE|README)[^/]*", re.IGNORECASE)
SPARE = 1 << 28  # bytes of the disk that are left free


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint folder that was written: its weights' bytes, and those of its source."""

    folder: Path
    num_bytes: int
    source_bytes: int


def quantize(
    src: str | Path,
    out: str | Path,
    bits: int = 4,
    group_size: int = 64,
    recipe: str = "uniform",
    *,
    layout: str = "mlx",
    skip_vision: bool = False,
    dequantize: bool = False,
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a checkpoint with its matrices in groups of affine codes, as MLX keeps them.

    src: a hub name or a folder; out: a folder that is not there yet, or is empty. bits: 2, 3, 4, 5,
    6 or 8, of the decoder's matrices, in groups of group_size columns (32, 64 or 128). recipe:
    "uniform"; "mixed_2_6", "mixed_3_4", "mixed_3_6" or "mixed_4_6", which say the bits themselves;
    "moqe" for experts alone. Encoders have 8 bits, or stay as they are with skip_vision. layout:
    "mlx" has the names and axes of mlx-vlm, "hf" those of the source; `load` reads both.
    dequantize: write a quantised checkpoint's matrices as bfloat16 instead.

    Memory holds a few rows at a time. The folder appears when it is whole. Raises InputError for
    what cannot be meant, NotFoundError and CheckpointError for a source that cannot be read.
    """
    _check(bits, group_size, recipe, layout)
    target = _target(Path(out).expanduser())
    folder = hub.resolve(src, revision)
    config = read_config(folder)
    files = weights.weight_files(folder)
    stored = list(weights.all_tensors(files))
    converted = stored_metadata(files[0]).get("format") == "mlx"
    stated = None
    if dequantize:
        if (bits, group_size, recipe, layout, skip_vision) != (4, 64, "uniform", "mlx", False):
            raise _lost_options()
        outputs = _dequantised(stored, config)
    else:
        _refuse_quantised(config)
        chosen = _Choice(build(folder), bits, group_size, recipe, skip_vision)
        refuse_lost_adapters(folder, chosen.model.family, chosen.model.decoder)
        outputs = chosen.outputs(stored, renamed=layout == "mlx" and not converted)
        stated = quantization(outputs, recipes.first_bits(recipe, bits), group_size)
        converted = converted or layout == "mlx"
    with _folder_in_place(target, outputs) as unfinished:
        _copy_others(folder, unfinished)
        form = {"format": "mlx" if converted else "pt"}
        with Shards(unfinished, [output.planned() for output in outputs], form) as shards:
            write_all(outputs, shards, on_progress)
        _write_config(folder, unfinished, stated, both=converted)
    return Written(target, shards.num_bytes, sum(tensor.num_bytes for tensor in stored))


def _check(bits: int, group_size: int, recipe: str, layout: str) -> None:
    """Raise InputError for options that mean nothing."""

    def refuse(what: str, remedy: str, param: str) -> None:
        raise InputError(what, remedy=remedy, param=param)

    if recipe not in recipes.RECIPES:
        refuse(f"Unknown recipe {recipe!r}", f"Use {', '.join(recipes.RECIPES)}", "recipe")
    if layout not in recipes.LAYOUTS:
        refuse(f"Unknown layout {layout!r}", f"Use {' or '.join(recipes.LAYOUTS)}", "layout")
    if bits not in recipes.BITS:
        choices = ", ".join(map(str, recipes.BITS))
        refuse(f"Cannot quantise to {bits} bits", f"Use one of {choices}", "bits")
    if group_size not in recipes.GROUPS:
        choices = ", ".join(map(str, recipes.GROUPS))
        refuse(f"Cannot quantise in groups of {group_size}", f"Use one of {choices}", "group_size")
    if recipe in recipes.MIXED and bits not in (4, recipes.MIXED[recipe][0]):
        refuse(f"The recipe {recipe} says the bits itself", "Leave the bits out", "bits")


def _target(out: Path) -> Path:
    """Where to write; InputError where something is already."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(
            f"{out} is there already",
            why="it is a file" if out.is_file() else "the folder is not empty",
            remedy="Name a new folder",
            param="out",
        )
    return out


def _refuse_quantised(config: dict[str, Any]) -> None:
    """Raise InputError for a checkpoint whose config says that it is quantised."""
    text = config.get("text_config") or {}
    if any(part.get(name) for part in (config, text) for name in STATED):
        raise InputError(
            "The checkpoint is quantised already",
            remedy="Name the model it was made from; --dequantize writes one in MLX's groups "
            "as bfloat16",
            param="model",
        )


def _lost_options() -> InputError:
    return InputError(
        "What is dequantised takes no bits, group size, recipe, layout or skipped encoders",
        remedy="Leave them out",
        param="dequantize",
    )


def _dequantised(stored: Sequence[StoredTensor], config: dict[str, Any]) -> list[Output]:
    whole = mlx.grouped(stored, config.get("quantization"))
    if not any(isinstance(tensor, mlx.AffineTensor) for tensor in whole):
        raise InputError(
            "The checkpoint holds nothing that can be dequantised",
            why="its config.json states no affine groups in MLX's layout",
            remedy="Leave --dequantize out, or name a checkpoint that `opsin quantize` made",
            param="dequantize",
        )
    return [
        Output(t.name, (t,), dtype=BF16 if isinstance(t, mlx.AffineTensor) else None) for t in whole
    ]


class _Choice:
    """Which tensors of a model are quantised, and how."""

    def __init__(
        self, model: Model, bits: int, group_size: int, recipe: str, skip_vision: bool
    ) -> None:
        self.model = model
        self.bits, self.group_size, self.recipe = bits, group_size, recipe
        self.skip_vision = skip_vision
        eligible = quantised_formats(model.decoder, model.towers, 8)
        self.modules = {n: m for n, m in model.named_modules() if m in eligible}
        self.makes_qkv = {m.qkv for m in model.modules() if isinstance(m, Attention)}

    def outputs(self, stored: Sequence[StoredTensor], *, renamed: bool) -> list[Output]:
        """What every tensor becomes; InputError where none would be quantised."""
        outputs = self.converted(stored) if renamed else [self.kept(tensor) for tensor in stored]
        if any(output.bits for output in outputs):
            return outputs
        raise InputError(
            "Nothing of this checkpoint is quantised",
            why="the model has no experts"
            if self.recipe == "moqe"
            else "no matrix has whole groups of columns",
            param="recipe",
        )

    def kept(self, tensor: StoredTensor) -> Output:
        """A tensor under its own name, quantised where it can be.

        One of all experts that has the name of a parameter gets that of a module's weight.
        """
        output = self._grouped(Output(tensor.name, (tensor,), self._swapped(tensor)), tensor)
        if not output.bits:
            return replace(output, transposed=False)
        whole = tensor.name.endswith(".weight")
        return output if whole else replace(output, name=f"{tensor.name}.weight")

    def converted(self, stored: Sequence[StoredTensor]) -> list[Output]:
        """Every tensor as MLX's layout has it; experts stacked, gates and what they gate apart."""
        names = self.model.family.mlx_names
        if names is None:
            raise InputError(
                "The checkpoint cannot be written in MLX's layout",
                why="what mlx-vlm calls the weights of models of type "
                f"{self.model.config.model_type!r} is not known here",
                remedy="Use --layout hf, which keeps the names",
                param="layout",
            )
        stacks: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
        outputs: dict[str, Output] = {}
        for tensor in stored:
            place = names.place(tensor.name)
            for i, name in enumerate(place.names):
                output = _arranged(names, Output(name, (tensor,), self._swapped(tensor)))
                if len(place.names) > 1:
                    half = output.shape[-2] // 2
                    output = replace(output, rows=(i * half, (i + 1) * half))
                if place.number is not None:
                    stacks[name][place.number] = tensor
                    stack = tuple(expert for _, expert in sorted(stacks[name].items()))
                    output = replace(output, sources=stack)
                outputs[name] = self._grouped(output, tensor)
        tables = [o for name, o in outputs.items() if name.endswith("embed_tokens.weight")]
        if names.head is not None and names.head not in outputs and tables:
            outputs[names.head] = replace(tables[0], name=names.head)
        return list(outputs.values())

    def _grouped(self, output: Output, tensor: StoredTensor) -> Output:
        """An output in groups of the size asked for, or of 32 where these are not whole."""
        bits = self._bits(tensor)
        if not bits:
            return output
        columns = output.shape[-1]
        group = next((size for size in (self.group_size, 32) if columns % size == 0), 0)
        return replace(output, bits=bits, group=group) if group else output

    def _swapped(self, tensor: StoredTensor) -> bool:
        """Whether a tensor of all experts is stored with what goes in before what comes out."""
        target = target_of(tensor.name, self.model.family.rename)
        if target.transposed is None or len(tensor.shape) != 3:
            return False
        shape = self.model.get_parameter(target.base).shape
        return target.transposed == "^T" or tensor.shape != shape

    def _bits(self, tensor: StoredTensor) -> int:
        """The bits of a tensor, 0 for one that stays."""
        family = self.model.family
        found = 0
        for part in family.apart(family.sliced(tensor)):
            ignored = any(re.search(pattern, part.name) for pattern in family.ignored)
            target = target_of(part.name, family.rename)
            owner, _, kind = target.base.rpartition(".")
            module = self.modules.get(owner)
            matrix = kind == "weight" and part.dtype.is_floating_point and len(part.shape) in (2, 3)
            if ignored or module is None or not matrix or type(part) is not StoredTensor:
                return 0
            named = tensor.name.endswith(".weight") or len(tensor.shape) == 3
            if not named or (target.transposed is not None and len(part.shape) == 2):
                return 0
            place = self._place(owner, module, target.index)
            if not (self.skip_vision and place.kind == "tower"):
                found = max(found, recipes.bits_of(self.recipe, place, self.bits))
        return found

    def _place(self, owner: str, module: nn.Module, index: tuple[int, ...]) -> Place:
        if owner.startswith("towers."):
            return Place("tower")
        layer = re.match(r"decoder\.layers\.(\d+)\.", owner)
        if layer is None:
            return Place("table")
        value = module in self.makes_qkv and index[:1] == (2,)
        kind: recipes.Kind = "expert" if isinstance(module, ExpertLinear) else "linear"
        down = owner.endswith(".down")
        return Place(kind, int(layer[1]), len(self.model.decoder.layers), sensitive=value or down)


def _arranged(names: MLXNames, output: Output) -> Output:
    """An output with the axes and the offset that MLX's layout has for its name."""
    axes = len(output.sources[0].shape)
    picture = axes > 3 and output.name.endswith(".weight")
    moved = picture or (axes == 3 and re.search(names.moved, output.name) is not None)
    offset = 1.0 if re.search(names.offset, output.name) else 0.0
    return replace(output, channels_last=moved, offset=offset)


@contextmanager
def _folder_in_place(target: Path, outputs: Sequence[Output]) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole and vanishes if it will not be."""
    needed = sum(planned.num_bytes for output in outputs for planned in output.planned())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < needed + SPARE:
            raise InputError(
                f"{target} cannot be written",
                why=f"{math.ceil(needed / 1e9)} GB are needed, and the disk has not as much free",
                remedy="Free some, or name a folder on another disk",
                param="out",
            )
        unfinished = Path(tempfile.mkdtemp(".part", f".{target.name}.", target.parent))
        try:
            folder = unfinished / "whole"  # with the usual permissions
            folder.mkdir()
            yield folder
            if target.is_dir():
                target.rmdir()
            folder.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written", why=error.strerror or str(error), param="out"
        ) from error


def _copy_others(folder: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, processor, templates, licence, adapters."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    top = {name for name in found if "/" not in name}
    rewritten = {name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))}
    wanted = {*hub.wanted_files(found), *(name for name in top if FREE.fullmatch(name))}
    for name in sorted(wanted - rewritten - {"config.json"}):
        if not name.endswith(".gguf"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def _write_config(folder: Path, target: Path, stated: dict[str, Any] | None, *, both: bool) -> None:
    """config.json with what it says of quantisation; last, since it makes a folder a checkpoint."""
    config = {k: v for k, v in read_json(folder / "config.json").items() if k not in STATED}
    if stated is not None:
        config |= dict.fromkeys(STATED if both else STATED[:1], stated)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
