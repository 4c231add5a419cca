"""Arithmetic behind one interface: plain torch here, native CPU and GPU kernels beside it."""

import torch

from opsin.kernels import onednn
from opsin.kernels.cpu.library import Library
from opsin.kernels.interface import Activation, AttentionBatch, Kernels
from opsin.kernels.native import NativeKernels
from opsin.kernels.packed_rows import CacheRows, PackedRows

__all__ = ["Activation", "AttentionBatch", "CacheRows", "Kernels", "PackedRows", "select"]


def select(device: torch.device, library: Library | None = None) -> Kernels:
    """The fastest kernels for a device; `library` is the native one, ready for use."""
    if device.type != "cpu":
        return Kernels()
    if library is not None:
        return NativeKernels(library)
    return onednn.OneDnnKernels() if onednn.is_supported() else Kernels()
