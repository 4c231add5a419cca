"""From the tensors of a checkpoint folder to the parameters of a model, by rename rules that are
data.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from opsin.checkpoint.safetensors import StoredTensor, stored_tensors
from opsin.errors import CheckpointError

# (regular expression, replacement): all rules are applied to each name, one after another. The
# replacement is a function where numbers in a name change.
Rename: TypeAlias = tuple[str, str | Callable[[re.Match[str]], str]]

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


class Packer(Protocol):
    """What puts something smaller or faster in the place of loaded weights."""

    def lend(self, module: nn.Module, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Memory for a parameter of a module that will be taken over; None for the caller's own."""
        ...

    def filled(self, module: nn.Module) -> None:
        """All parameters of a module are in place."""
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
    `device`. A `packer` takes over modules once their own parameters are all filled, and lends them
    memory until then. Memory never holds more than the model and the modules being filled.

    A target may end in an index, `qkv.weight[1]`, which names a part of a fused parameter, and in
    `^T` if the checkpoint stores it with its last two axes swapped (`^T?`: if its shape says so).
    Raises CheckpointError unless every tensor is used (or matches a pattern of `ignored`) and every
    parameter is filled, whole and once.
    """
    missing = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unused: list[tuple[str, str]] = []
    for tensor in tensors:
        if any(re.search(pattern, tensor.name) for pattern in ignored):
            continue
        target = renamed(tensor.name, rules)
        match = _TARGET.match(target)
        assert match is not None
        base, index, transposed = match.groups()
        if base not in missing:
            unused.append((tensor.name, target))
            continue
        owner_name, _, name = base.rpartition(".")
        owner = model.get_submodule(owner_name)
        out = _memory(owner, name, dtype, device, packer)
        if index:
            assert isinstance(owner, HasParts), f"{owner_name} has no parts to fill"
            out = owner.part(name, tuple(map(int, index.split(","))))
        if transposed == "^T" or (transposed and tensor.shape != tuple(out.shape)):
            out = out.mT
        out = _as_stored(tensor.shape, out)
        _check_shape(tensor, target, out)
        tensor.read_into(out)
        missing[base] -= out.numel()
        if packer is not None and missing[base] == 0:
            own = [f"{owner_name}.{name}" for name, _ in owner.named_parameters(recurse=False)]
            if not any(missing[name] for name in own):
                packer.filled(owner)
    unfilled = [name for name, count in missing.items() if count]
    if unused or unfilled:
        raise _mismatch(unused, unfilled)


def _memory(
    owner: nn.Module, name: str, dtype: torch.dtype, device: torch.device, packer: Packer | None
) -> Tensor:
    """A parameter's memory, made or borrowed now if it has none yet."""
    parameter = owner.get_parameter(name)
    if parameter.is_meta:
        precise = isinstance(owner, HasPrecision) and owner.precise
        kind = dtype if parameter.dtype.is_floating_point and not precise else parameter.dtype
        lent = None if packer is None else packer.lend(owner, parameter.shape, kind)
        memory = torch.empty(parameter.shape, dtype=kind, device=device) if lent is None else lent
        parameter = nn.Parameter(memory, requires_grad=False)
        owner.register_parameter(name, parameter)
    return parameter.data


def _as_stored(shape: tuple[int, ...], out: Tensor) -> Tensor:
    """A matrix over patches as MLX stores its convolution: the three colours last, not first."""
    colours_last = out.ndim == 2 and len(shape) > 3 and shape[-1] == 3 and shape[1] != 3
    if not colours_last or math.prod(shape) != out.numel():
        return out
    return out.unflatten(1, (3, *shape[1:-1])).movedim(1, -1)


def _check_shape(tensor: StoredTensor, target: str, out: Tensor) -> None:
    # A convolution over patches is stored with its kernel axes apart; here it is a matrix. A
    # table or vector may be stored with axes of one in front, which mean nothing.
    shape = tensor.shape
    while len(shape) > out.ndim and shape[0] == 1:
        shape = shape[1:]
    flat = out.ndim == 2 and len(shape) > 2 and shape[0] == out.shape[0]
    same = shape == tuple(out.shape)
    if not same and not (flat and tensor.num_bytes == out.numel() * tensor.dtype.itemsize):
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
