"""From the tensors of a checkpoint folder to the parameters of a model, by rename rules that are
data.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from opsin.checkpoint.safetensors import MappedFiles, MappedRange, StoredTensor, stored_tensors
from opsin.errors import CheckpointError

# (regular expression, replacement): all rules are applied to each name, one after another. The
# replacement is a function where numbers in a name change.
Rename: TypeAlias = tuple[str, str | Callable[[re.Match[str]], str]]

# Smaller tensors are read: a page of the file for each would cost as much.
MAP_BYTES = 1 << 20
_TARGET = re.compile(r"^(.*?)(?:\[([\d,]+)\])?(\^T\??)?$")


@runtime_checkable
class HasParts(Protocol):
    """A module whose parameters are filled piece by piece."""

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """The view of parameter `name` that a checkpoint tensor named `...name[index]` fills."""
        ...


@runtime_checkable
class HasPrecision(Protocol):
    """A module that says whether its parameters keep their dtype whatever the model's is."""

    precise: bool


@runtime_checkable
class LiesInFile(Protocol):
    """A module that is told where in a file its weight lies, if it does."""

    mapped: MappedRange | None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, complete according to its index.

    Raises CheckpointError if a shard is missing, or if there are only pickled weights.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"The checkpoint {folder.name} is incomplete",
                why=f"{len(missing)} of its {len(names)} weight files are missing, "
                f"the first is {missing[0]}",
                remedy="Download it again",
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(("adapter_", "consolidated"))]
    if files:
        return files
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickled:
        raise CheckpointError(
            f"The checkpoint {folder.name} holds only pickled weights ({pickled[0].name})",
            why="loading a pickle can run code",
            remedy="Convert it to safetensors, or use a revision that has model.safetensors",
        )
    raise CheckpointError(
        f"The checkpoint {folder.name} has no weights",
        why="there is no .safetensors file in it",
        remedy="Name a folder that holds config.json and model.safetensors",
    )


def all_tensors(files: Sequence[Path]) -> Iterator[StoredTensor]:
    """Every tensor of several files, not yet read."""
    for file in files:
        yield from stored_tensors(file)


def renamed(name: str, rules: Iterable[Rename]) -> str:
    """A checkpoint's tensor name in the model's words, by applying each rule in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True, slots=True)
class Target:
    """What a checkpoint tensor fills: a parameter, or a part of it, perhaps transposed."""

    name: str
    base: str
    index: tuple[int, ...]
    transposed: str | None


def target_of(name: str, rules: Iterable[Rename]) -> Target:
    """What the tensor of a name fills, by the rules."""
    target = renamed(name, rules)
    match = _TARGET.match(target)
    assert match is not None
    base, parts, transposed = match.groups()
    return Target(target, base, tuple(map(int, parts.split(","))) if parts else (), transposed)


class Sink(Protocol):
    """Where the values of one checkpoint tensor go that fill no parameter as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What the tensor's shape must be."""
        ...

    @property
    def filled(self) -> bool:
        """Whether the values are there already, so that the tensor is only checked."""
        ...

    def read(self, tensor: StoredTensor, files: MappedFiles) -> bool:
        """Take a tensor of this shape as it is stored, or where it lies in one of the files.

        False to be given its values instead.
        """
        ...

    def fill(self, values: Tensor) -> None:
        """Take values of this shape."""
        ...


class Packer(Protocol):
    """What puts something smaller or faster in the place of weights as they are read."""

    def sink(
        self, module: nn.Module, name: str, index: tuple[int, ...], tensor: StoredTensor
    ) -> Sink | None:
        """What takes the part `index` of a module's parameter; None if it is to be filled."""
        ...


def assign(
    model: nn.Module,
    tensors: Iterable[StoredTensor],
    rules: Sequence[Rename],
    ignored: Sequence[str] = (),
    *,
    dtype: torch.dtype,
    device: torch.device,
    packer: Packer | None = None,
) -> None:
    """Read every tensor into the parameter that its renamed name stands for.

    The model's parameters are on the meta device and get their memory when their first tensor
    comes: in `dtype`, if they are floating-point and their module does not ask for precision, on
    `device`. On the CPU, large ones that are stored just so are the file itself, mapped: read as
    they are used. A `packer` takes the tensors of some parameters, which then get no memory. Memory
    never holds more than the model and one tensor.

    A target may end in an index, `qkv.weight[1]`, which names a part of a fused parameter, and in
    `^T` if the checkpoint stores it with its last two axes swapped (`^T?`: if its shape says so).
    Raises CheckpointError unless every tensor is used (or matches a pattern of `ignored`) and every
    parameter is filled, whole and once.
    """
    missing = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unused: list[tuple[str, str]] = []
    files = MappedFiles()
    for tensor in tensors:
        if any(re.search(pattern, tensor.name) for pattern in ignored):
            continue
        target = target_of(tensor.name, rules)
        if target.base not in missing:
            unused.append((tensor.name, target.name))
            continue
        owner_name, _, name = target.base.rpartition(".")
        owner = model.get_submodule(owner_name)
        sink = None if packer is None else packer.sink(owner, name, target.index, tensor)
        if sink is not None:
            missing[target.base] -= _pour(tensor, target, sink, dtype, files)
            continue
        if device.type == "cpu" and _map(owner, name, tensor, target, dtype, files):
            missing[target.base] -= math.prod(tensor.shape)
            continue
        out = _memory(owner, name, dtype, device)
        if target.index:
            assert isinstance(owner, HasParts), f"{owner_name} has no parts to fill"
            out = owner.part(name, target.index)
        out = _as_stored(tensor, target, out)
        tensor.read_into(out)
        missing[target.base] -= out.numel()
    unfilled = [name for name, count in missing.items() if count]
    if unused or unfilled:
        raise _mismatch(unused, unfilled)


def _pour(
    tensor: StoredTensor, target: Target, sink: Sink, dtype: torch.dtype, files: MappedFiles
) -> int:
    """Hand a tensor to a sink, as it is stored if it can be; the number of its elements."""
    whole = torch.empty(sink.shape, dtype=dtype, device="meta")
    same = _as_stored(tensor, target, whole) is whole
    if sink.filled:
        return whole.numel()
    if not (same and tensor.shape == sink.shape and sink.read(tensor, files)):
        whole = torch.empty(sink.shape, dtype=dtype)
        tensor.read_into(_as_stored(tensor, target, whole))
        sink.fill(whole)
    return whole.numel()


def _memory(owner: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter's memory, made now if it has none yet."""
    parameter = owner.get_parameter(name)
    if parameter.is_meta:
        kind = _dtype(owner, parameter, dtype)
        memory = torch.empty(parameter.shape, dtype=kind, device=device)
        parameter = nn.Parameter(memory, requires_grad=False)
        owner.register_parameter(name, parameter)
    return parameter.data


def _dtype(owner: nn.Module, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a parameter is kept in: `dtype`, unless it is no float or its module is precise."""
    precise = isinstance(owner, HasPrecision) and owner.precise
    return dtype if parameter.dtype.is_floating_point and not precise else parameter.dtype


def _map(
    owner: nn.Module,
    name: str,
    tensor: StoredTensor,
    target: Target,
    dtype: torch.dtype,
    files: MappedFiles,
) -> bool:
    """Let a parameter be a tensor's own bytes in its file, if they are large and just as needed."""
    parameter = owner.get_parameter(name)
    kind = _dtype(owner, parameter, dtype)
    whole = type(tensor) is StoredTensor and not target.index
    if not (whole and parameter.is_meta and tensor.dtype == kind):
        return False
    if tensor.num_bytes < MAP_BYTES or _as_stored(tensor, target, parameter) is not parameter:
        return False
    memory = files.of(tensor)
    if memory is None:
        return False
    owner.register_parameter(name, nn.Parameter(memory.view(parameter.shape), requires_grad=False))
    if name == "weight" and isinstance(owner, LiesInFile):
        owner.mapped = files.range_of(tensor)
    return True


def _as_stored(tensor: StoredTensor, target: Target, out: Tensor) -> Tensor:
    """A view of memory with its axes in the order that the checkpoint has them, checked to fit."""
    if target.transposed == "^T" or (target.transposed and tensor.shape != tuple(out.shape)):
        out = out.mT
    # A matrix over patches as MLX stores its convolution: the three colours last, not first.
    shape = tensor.shape
    colours_last = out.ndim == 2 and len(shape) > 3 and shape[-1] == 3 and shape[1] != 3
    if colours_last and math.prod(shape) == out.numel():
        out = out.unflatten(1, (3, *shape[1:-1])).movedim(1, -1)
    # Any other convolution of MLX's: what goes in stands last.
    turnable = out.ndim in (3, 4) and shape != tuple(out.shape)
    if turnable and shape == tuple(out.movedim(1, -1).shape):
        out = out.movedim(1, -1)
    _check_shape(tensor, target.name, out)
    return out


def _check_shape(tensor: StoredTensor, target: str, out: Tensor) -> None:
    # A convolution over patches is stored with its kernel axes apart; here it is a matrix. A
    # table or vector may be stored with axes of one in front, which mean nothing.
    shape = tensor.shape
    while len(shape) > out.ndim and shape[0] == 1:
        shape = shape[1:]
    flat = out.ndim == 2 and len(shape) > 2 and shape[0] == out.shape[0]
    same = shape == tuple(out.shape)
    if not same and not (flat and math.prod(shape) == out.numel()):
        raise CheckpointError(
            "The checkpoint does not fit its config.json",
            why=f"tensor {tensor.name} has shape {list(tensor.shape)}, "
            f"but {target} is {list(out.shape)}",
            remedy="Check that config.json and the weights come from the same model",
        )


def _mismatch(unused: list[tuple[str, str]], missing: list[str]) -> CheckpointError:
    reasons = []
    if unused:
        name, target = unused[0]
        reasons.append(
            f"{len(unused)} tensors have no place, the first is {name} (read as {target})"
        )
    if missing:
        reason = f"{len(missing)} parameters are not filled, the first is {missing[0]}"
        close = difflib.get_close_matches(missing[0], [target for _, target in unused], n=1)
        reasons.append(reason + (f" (closest: {close[0]})" if close else ""))
    return CheckpointError(
        "The checkpoint's weights do not match the model",
        why="; ".join(reasons),
        remedy="Check that the folder is complete and that config.json belongs to these weights",
    )
