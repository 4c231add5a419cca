"""Arithmetic behind one interface: plain torch here, native CPU and GPU kernels beside it."""

import torch

from opsin.kernels import onednn
from opsin.kernels.interface import Activation, AttentionBatch, Kernels
from opsin.kernels.packed_rows import CacheRows, PackedRows

__all__ = ["Activation", "AttentionBatch", "CacheRows", "Kernels", "PackedRows", "select"]


def select(device: torch.device) -> Kernels:
    """The fastest kernels for a device."""
    if device.type == "cpu" and onednn.is_supported():
        return onednn.OneDnnKernels()
    return Kernels()
