"""Finding and loading the native library, and its kernels as functions of tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opsin.errors import EngineError
from opsin.kernels.cpu import abi

_FOLDER = Path(__file__).parent
_NAMES = ("_native.so", "_native.dylib")
_MEANING = {
    -1: "an argument is out of range",
    -2: "out of memory",
    -3: "no such instruction set",
    -4: "a file ended or could not be read",
}


def _path() -> Path | None:
    return next((_FOLDER / name for name in _NAMES if (_FOLDER / name).exists()), None)


@functools.cache
def build_id() -> str:
    """A digest of the library's code: two builds of one digest pack matrices in one way."""
    path = _path()
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    path = _path()
    if path is None:
        return None, "it was not built: installing found no C++ compiler that could"
    try:
        handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in abi.SIGNATURES.items():
            function = handle[name]
            function.restype = result
            function.argtypes = arguments
            setattr(handle, name, function)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load ({error})"
    if handle.opsin_abi() != abi.abi_number():
        return None, f"{path.name} is of another version: install again"
    return handle, ""


@functools.cache
def _library(handle: ctypes.CDLL) -> Library:
    return Library(handle)


def load(isa: str = "auto", threads: int | None = None) -> Library | None:
    """The native library ready for use, or None where it was not built (see `why_missing`).

    `isa` forces one instruction set by name; "auto" takes the best of this machine. `threads`
    defaults to the physical cores this process may use. Loading again changes both.
    """
    handle, _ = _open()
    if handle is None:
        return None
    library = _library(handle)
    library.configure(isa, threads)
    return library


def why_missing() -> str:
    """Why `load` returns None, as a clause; empty when it does not."""
    return _open()[1]


def isa() -> str:
    """The instruction set in use, "torch" without the native library."""
    handle, _ = _open()
    return "torch" if handle is None else handle.opsin_isa().decode()


def physical_cores() -> int:
    """Physical cores this process may use: its affinity and its container's share, at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    allowed = os.sched_getaffinity(0)
    for cpu in allowed:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (folder / "physical_package_id").read_text()
            cores.add((package, (folder / "core_id").read_text()))
        except OSError:
            cores.add(("", str(cpu)))
    return max(1, min(len(cores), _quota()))


def _quota() -> int:
    """Whole processors the container grants, or many."""
    try:
        share, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 16
    return 1 << 16 if share == "max" else max(1, -(-int(share) // int(period)))


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data; None for None."""
    return None if x is None else x.data_ptr()


def _ints(values: Sequence[int] | Tensor) -> Tensor:
    """int32 and contiguous."""
    return torch.as_tensor(values, dtype=torch.int32).contiguous()


@dataclass(frozen=True, slots=True)
class Paged:
    """Where the queries of a batch stand and which cache blocks their sequences read.

    query_start (s + 1,), num_keys (s,), block_tables (s, blocks) and, per token, the visible range
    of key positions [visible_from, visible_until): all int32; a missing range is open.
    """

    query_start: Tensor
    num_keys: Tensor
    block_tables: Tensor
    block_size: int
    visible_from: Tensor | None = None
    visible_until: Tensor | None = None


class Library:
    """The native kernels. Every tensor is on the CPU; results are new tensors unless said."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle = handle

    def check(self, code: int, what: str) -> None:
        """Raise EngineError for a negative answer of the library."""
        if code < 0:
            raise EngineError(f"native kernel {what} failed", why=_MEANING.get(code, str(code)))

    def configure(self, isa: str = "auto", threads: int | None = None) -> None:
        """Choose the instruction set and the number of threads."""
        count = physical_cores() if threads is None else threads
        code = self.handle.opsin_init(isa.encode(), count)
        if code < 0:
            raise EngineError(
                f"instruction set {isa!r} cannot be used",
                why="this machine or this build lacks it",
                remedy=f"use one of: auto, {', '.join(self.instruction_sets())}",
            )

    def instruction_sets(self) -> list[str]:
        """Instruction sets of this build that this machine has, best first."""
        count = self.handle.opsin_isa_count()
        return [self.handle.opsin_isa_name(i).decode() for i in range(count)]

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.handle.opsin_isa().decode())

    @property
    def threads(self) -> int:
        """Threads that share the calling thread's next call."""
        return int(self.handle.opsin_threads())

    def set_aside(self, threads: int) -> bool:
        """Let the calling thread's calls run beside those of others from now on, by a team of so
        many threads, which the others' next calls lack; 0: in turn with them, as before.

        False, and nothing is changed, where there are no more threads than that, or another thread
        has such a team.
        """
        code = self.handle.opsin_aside(threads)
        self.check(code, "aside")
        return bool(code)

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Norm of x + residual over the last axis; (normed, sum), the sum being x without one."""
        return self._norm(x, weight, None, eps, residual, layer_norm=False)

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `rms_norm`, with the mean taken away and a bias."""
        return self._norm(x, weight, bias, eps, residual, layer_norm=True)

    def _norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        *,
        layer_norm: bool,
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        out = torch.empty_like(x)
        summed = torch.empty_like(x) if residual is not None else None
        residual = None if residual is None else residual.contiguous()
        weight, bias = (None if w is None else w.float().contiguous() for w in (weight, bias))
        dim = x.shape[-1]
        code = self.handle.opsin_norm(
            pointer(x), pointer(residual), pointer(weight), pointer(bias), layer_norm, eps,
            x.numel() // dim, dim, abi.DTYPES[x.dtype], pointer(out), pointer(summed),
        )  # fmt: skip
        self.check(code, "norm")
        return out, x if summed is None else summed

    def activate(self, gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
        """activation(gate) * up, element by element; without `up` the activation alone."""
        gate = gate.contiguous()
        up = None if up is None else up.contiguous()
        out = torch.empty_like(gate)
        code = self.handle.opsin_activate(
            pointer(gate), pointer(up), abi.ACTIVATIONS[kind], gate.numel(),
            abi.DTYPES[gate.dtype], pointer(out),
        )  # fmt: skip
        self.check(code, "activate")
        return out

    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotate x (tokens, heads, head_dim) in place by cos, sin (tokens, rotary_dim / 2)."""
        tokens, heads, dim = x.shape
        if x.stride(1) != dim or x.stride(2) != 1:
            raise ValueError("heads must lie side by side")
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        code = self.handle.opsin_rope(
            pointer(x), pointer(cos), pointer(sin), tokens, heads, dim, 2 * cos.shape[-1],
            interleaved, x.stride(0), abi.DTYPES[x.dtype],
        )  # fmt: skip
        self.check(code, "rope")
        return x

    def argmax(self, logits: Tensor) -> int:
        """Index of the first largest of a row of float32 logits."""
        return int(self.handle.opsin_argmax(pointer(logits.contiguous()), logits.numel()))

    def softmax(self, logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, float]:
        """softmax(logits / temperature) of a float32 row, and the log of the sum it divides by."""
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        total = self.handle.opsin_softmax(
            pointer(logits), logits.numel(), temperature, pointer(out)
        )
        return out, total

    def paged_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        paged: Paged,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of query (tokens, heads, dim) over cached keys (slots, kv_heads, dim), bf16."""
        out = query.new_empty(*query.shape[:2], values.shape[2])
        sinks = None if sinks is None else sinks.float().contiguous()
        held = [_ints(paged.query_start), _ints(paged.num_keys), _ints(paged.block_tables)]
        ranges = [
            None if x is None else _ints(x) for x in (paged.visible_from, paged.visible_until)
        ]
        call = self._attention(query, keys, values, out, scale, softcap, sinks)
        call.query_start, call.num_keys, call.block_tables = (pointer(x) for x in held)
        call.visible_from, call.visible_until = (pointer(x) for x in ranges)
        call.sequences, call.max_blocks = paged.block_tables.shape
        call.block_size = paged.block_size
        self.check(self.handle.opsin_attention(ctypes.byref(call)), "attention")
        return out

    def dense_attention(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float
    ) -> Tensor:
        """Bidirectional attention within runs of `lengths` rows of (tokens, heads, dim), bf16."""
        out = query.new_empty(*query.shape[:2], value.shape[2])
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.cumsum(_ints(lengths), 0)
        if int(starts[-1]) != query.shape[0] or query.shape[0] != key.shape[0]:
            raise ValueError("the lengths must add up to the rows of query, key and value")
        counts = starts.diff().contiguous()
        call = self._attention(query, key, value, out, scale, 0.0, None)
        call.query_start, call.num_keys = pointer(starts), pointer(counts)
        call.key_start = pointer(starts)
        call.sequences = len(lengths)
        self.check(self.handle.opsin_attention(ctypes.byref(call)), "attention")
        return out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> abi.Attention:
        for x in (query, key, value):
            if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
                raise ValueError("heads must lie side by side")
        if key.dtype != torch.bfloat16 or value.dtype != torch.bfloat16:
            raise ValueError("keys and values are bfloat16")
        return abi.Attention(
            query=pointer(query), key=pointer(key), value=pointer(value), out=pointer(out),
            sinks=pointer(sinks), query_stride=query.stride(0), key_stride=key.stride(0),
            value_stride=value.stride(0), out_stride=out.stride(0), tokens=query.shape[0],
            heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[2],
            value_dim=value.shape[2], dtype=abi.DTYPES[query.dtype], scale=scale, softcap=softcap,
        )  # fmt: skip

    def read_bandwidth(self, size: int = 1 << 28, repeats: int = 5) -> float:
        """Bytes a second that all threads together read from memory, the best of some tries."""
        return float(self.handle.opsin_read_bandwidth(size, repeats))

    def peak(self, kind: str, milliseconds: int = 50) -> float:
        """Operations a second of "bf16" or "int8" multiplication without memory traffic."""
        return float(self.handle.opsin_peak({"bf16": 0, "int8": 1}[kind], milliseconds))
