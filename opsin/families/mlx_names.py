"""How the names of a family's weights become those of MLX-layout checkpoints, and the way back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.errors import InputError

if TYPE_CHECKING:
    from opsin.checkpoint.weights import Rename

_FUSED = re.compile(r"^(?P<stem>.*\.experts)\.gate_up_proj(\.weight)?$")
_EXPERT = re.compile(r"^(?P<stem>.*\.experts)\.((?P<number>\d+)\.)?(?P<name>\w+_proj)(\.weight)?$")


@dataclass(frozen=True, slots=True)
class Place:
    """What a tensor is called in MLX's layout.

    names: one, or two for the halves of its rows. number: which expert it is of those stacked
    under the name.
    """

    names: tuple[str, ...]
    number: int | None = None


@dataclass(frozen=True, slots=True)
class MLXNames:
    """How mlx-vlm calls the weights of a family.

    prefixes: (as published or saved, as mlx-vlm has it or None for what it leaves out); the first
    that a name begins with counts. experts: where all experts' tensors stand that are published
    under `.experts`. offset: the norms that are stored with one added. moved: what has its second
    axis last beside the convolutions over pictures. head: what the embedding table is stored as
    once more where it is the head, because mlx-vlm always has one of its own. also: rules for names
    that it alone has.
    """

    prefixes: tuple[tuple[str, str | None], ...]
    experts: tuple[str, str] = (".experts", ".switch_mlp")
    offset: str = r"(?!)"
    moved: str = r"(?!)"
    head: str | None = None
    also: tuple[Rename, ...] = ()

    def place(self, name: str) -> Place:
        """Where a published tensor goes; no names where it is left out.

        Raises InputError for a name that fits no prefix.
        """
        named = self._renamed(name)
        if named is None:
            return Place(())
        if match := _FUSED.match(named):
            stem = self._experts(match["stem"])
            return Place((f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"))
        if match := _EXPERT.match(named):
            name = f"{self._experts(match['stem'])}.{match['name']}.weight"
            number = match["number"]
            return Place((name,), None if number is None else int(number))
        return Place((named,))

    def _renamed(self, name: str) -> str | None:
        for published, converted in self.prefixes:
            if name.startswith(published):
                return None if converted is None else converted + name.removeprefix(published)
        raise InputError(
            "The checkpoint cannot be written in MLX's layout",
            why=f"tensor {name} has no name there",
            remedy="Use --layout hf, which keeps the names",
            param="layout",
        )

    def _experts(self, stem: str) -> str:
        published, converted = self.experts
        return stem.removesuffix(published) + converted

    def reading(self) -> tuple[Rename, ...]:
        """Rules from mlx-vlm's names back to published ones, where it has others."""
        same = tuple(was for was, name in self.prefixes if was == name)
        back: dict[str, str] = {}
        for published, converted in self.prefixes:
            if converted and not converted.startswith(same):
                back.setdefault(converted, published)
        pairs = sorted(back.items(), key=lambda pair: -len(pair[0]))
        rules = tuple((f"^{re.escape(converted)}", name) for converted, name in pairs)
        return (*rules, *self.also)
