"""Native CPU kernels: a C++ library loaded with ctypes, and what to do where it is missing."""

from opsin.kernels.cpu.library import Library, isa, load, physical_cores, why_missing
from opsin.kernels.cpu.matrix import PackedMatrix

__all__ = ["Library", "PackedMatrix", "isa", "load", "physical_cores", "why_missing"]
