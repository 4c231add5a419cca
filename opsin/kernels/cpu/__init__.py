"""Native CPU kernels: a C++ library loaded with ctypes, and what to do where it is missing."""

from opsin.kernels.cpu.library import Library, build_id, isa, load, physical_cores, why_missing
from opsin.kernels.cpu.matrix import PackedMatrix

__all__ = ["Library", "PackedMatrix", "build_id", "isa", "load", "physical_cores", "why_missing"]
