"""Packed weights kept in a cache folder, and mapped when the same checkpoint is loaded again."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import nn

from opsin.checkpoint import repacked
from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import Rename, target_of
from opsin.engine.packing import Formats, Recipe
from opsin.errors import CheckpointError, EngineError
from opsin.kernels import cpu
from opsin.kernels.cpu.library import Library
from opsin.kernels.cpu.matrix import SLACK, PackedMatrix, Region
from opsin.kernels.packed import Packed
from opsin.nn.experts import ExpertLinear
from opsin.nn.late import LateMatrix
from opsin.nn.linear import Embedding, Linear
from opsin.quant.formats import WIDTHS, Format

LOG = logging.getLogger("opsin")
LAYOUT = 2  # to be raised when the same build packs the same checkpoint in another way
# What is kept where nobody asked for it: nothing that loads fast anyway, and no file that takes
# more than this share of the disk's free space, so that all of them together never fill it.
UNASKED_LEAST = 256 << 20  # bytes
UNASKED_SHARE = 0.1
KEEPER = "opsin-keeper"  # the thread that writes such a file
Kept = dict[nn.Module, list[PackedMatrix]]


@dataclass(frozen=True, slots=True)
class _Slot:
    """One matrix of a file: the module it belongs to, and its shape."""

    name: str
    module: nn.Module
    form: Format
    rows: int
    columns: int


class RepackedCache:
    """The file of one checkpoint, packed in one way on one instruction set.

    Its name says which checkpoint and which way; its header says which state of it, by the files'
    sizes, times and headers, so that a checkpoint that has changed is packed again in its place.
    """

    def __init__(
        self,
        folder: Path,
        library: Library,
        source: Path,
        slots: Sequence[_Slot],
        way: str,
        key: str,
        unasked: bool,
    ) -> None:
        self.folder = folder
        self.library = library
        self.source = source
        self.slots = slots
        self.way = way
        self.key = key
        self.unasked = unasked

    @classmethod
    def of(
        cls,
        folder: Path,
        source: Path,
        model: nn.Module,
        recipe: Recipe,
        tensors: Sequence[StoredTensor],
        rules: Sequence[Rename],
        *,
        unasked: bool,
    ) -> RepackedCache:
        """The file for a model whose parameters have no memory yet, read from `source`.

        `unasked`: it is kept only if it is worth it and takes little of the disk.
        """
        assert recipe.library is not None, "only what is packed natively is kept"
        slots = [slot for slot in _slots(model, recipe.formats) if is_kept(slot.form)]
        ways = [(s.name, s.form, s.rows, s.columns, s.module in recipe.interleaved) for s in slots]
        way = _digest(str(source.resolve()), recipe.library.isa, recipe.nothing.dtype, ways)
        files = sorted({tensor.path for tensor in tensors} | set(source.glob("*.safetensors")))
        stats = [(path.relative_to(source), path.stat()) for path in files]
        key = _digest(
            way,
            LAYOUT,
            _version(),
            cpu.build_id(),
            [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats],
            [repr(tensor).replace(str(source), "") for tensor in tensors],
            [target_of(tensor.name, rules).name for tensor in tensors],
        )
        return cls(folder, recipe.library, source, slots, way, key, unasked)

    @property
    def recipe(self) -> str:
        """How most of it is kept, in a word."""
        kinds = [slot.form.kind for slot in self.slots]
        return min(kinds, key=WIDTHS.__getitem__)

    @property
    def path(self) -> Path:
        """The file."""
        hub = self.source.parent.name == "snapshots"
        named = self.source.parent.parent if hub else self.source.resolve()
        name = named.name.removeprefix("models--")
        return self.folder / f"{name}.{self.recipe}.{self.way[:12]}{repacked.SUFFIX}"

    def read(self) -> Kept:
        """The matrices that the file holds, empty if there is none that is of use."""
        try:
            found = repacked.read(self.path, self.key)
            return {} if found is None else self._views(found)
        except (CheckpointError, EngineError, OSError) as error:
            why = error.why if isinstance(error, CheckpointError | EngineError) else error
            LOG.warning("%s cannot be used (%s): packing the weights again", self.path.name, why)
            return {}

    def _views(self, found: repacked.Mapping) -> Kept:
        kept: Kept = {}
        if set(found.places) != {slot.name for slot in self.slots}:
            raise CheckpointError(f"{self.path.name} is damaged", why="it holds other matrices")
        for slot in self.slots:
            address, num_bytes = found.places[slot.name]
            region = Region(found.memory, address, num_bytes + SLACK)
            matrix = PackedMatrix.view(self.library, slot.form, slot.rows, slot.columns, region)
            kept.setdefault(slot.module, []).append(matrix)
        return kept

    def will_keep(self) -> bool:
        """Whether the file is there or is to be written, as far as that can be said before."""
        sizes = (slot.form.bits * slot.rows * slot.columns / 8 for slot in self.slots)
        with suppress(OSError):
            return self.path.is_file() or not self.unasked or self._is_cheap(int(sum(sizes)))
        return False

    def keep(self) -> None:
        """Write the file; beside the first answers if nobody asked for it.

        The process ends only when the file is whole.
        """
        if self.unasked:
            threading.Thread(target=self.write, name=KEEPER).start()
        else:
            self.write()

    def write(self) -> None:
        """Keep the matrices that the model was given, or say in a line why that cannot be."""
        try:
            if self.unasked and not self._is_cheap(
                sum(_packed(slot).nbytes for slot in self.slots)
            ):
                return
            parts = [(slot.name, _matrix(slot).memory()) for slot in self.slots]
            size = repacked.write(self.path, self.key, str(self.source), self.recipe, parts)
        except (OSError, EngineError) as error:
            level = logging.INFO if self.unasked else logging.WARNING
            why = error.why if isinstance(error, EngineError) else error.strerror or error
            LOG.log(level, "cannot keep the packed weights in %s (%s)", self.folder, why)
        else:
            LOG.log(
                logging.WARNING if self.unasked else logging.INFO,
                "kept the packed weights in %s (%.2f GB) to load at once next time: "
                "--repacked-cache off keeps none",
                self.path,
                size / 1e9,
            )

    def _is_cheap(self, num_bytes: int) -> bool:
        """Whether a file of so many bytes saves time, and takes little of what the disk has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        share = num_bytes / shutil.disk_usage(self.folder).free
        return num_bytes >= UNASKED_LEAST and share <= UNASKED_SHARE


def is_kept(form: Format) -> bool:
    """Whether a matrix of a format is worth keeping: bfloat16 as it is lies in the checkpoint."""
    return form.kind != "bf16"


def _slots(model: nn.Module, formats: Formats) -> Iterator[_Slot]:
    """Every matrix that a model's formats ask for, in the order of its modules."""
    for name, module in model.named_modules():
        if module not in formats:
            continue
        *count, rows, columns = module.get_parameter("weight").shape
        names = [f"{name}.{i}" for i in range(count[0])] if count else [name]
        for each in names:
            yield _Slot(each, module, formats[module], rows, columns)


def _packed(slot: _Slot) -> Packed:
    """What a slot's module was given, which may wait for its values."""
    module = slot.module
    if isinstance(module, ExpertLinear):
        return module.packed[int(slot.name.rpartition(".")[2])]
    assert isinstance(module, Linear | Embedding), "nothing else is packed"
    assert module.packed is not None, "every slot's module is packed"
    return module.packed


def _matrix(slot: _Slot) -> PackedMatrix:
    """The matrix that a slot's module was given, with its values."""
    packed = _packed(slot)
    found = packed.now() if isinstance(packed, LateMatrix) else packed
    assert isinstance(found, PackedMatrix), "only native matrices are kept"
    return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _version() -> str:
    try:
        return metadata.version("opsin")
    except metadata.PackageNotFoundError:  # run from its source
        return ""
