"""Builds the native CPU kernels with the C++ compiler there is; without one they are left out."""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

SOURCE = Path("opsin/kernels/cpu/src")
HEADERS = [str(path) for path in sorted(SOURCE.glob("*.h"))]
# One place for every way of installing, so that the second way need not compile again.
OBJECTS = f"build/native-{platform.machine().lower()}"
COMMON = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = {
    "isa_avx2": AVX2,
    "isa_avx2vnni": [*AVX2, "-mavxvnni"],
    "isa_avx512": AVX512,
    "isa_avx512vnni": [*AVX512, "-mavx512vnni"],
    "isa_avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "isa_amx": [
        *AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16",
    ],
}  # fmt: skip
ARM = {"isa_neon": ["-march=armv8.2-a+dotprod"]}
# What a file that does not compile is tried with. GCC 13 ends with an internal error at the
# portable kernels otherwise; where they compile without, they are twice as fast.
PLAINER = ["-fno-tree-slp-vectorize"]


def flags_of(stem: str) -> list[str]:
    """The flags of one source file: an instruction set of its own for the isa_ files."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return X86.get(stem, [])
    if machine in ("arm64", "aarch64"):
        return ARM.get(stem, [])
    return []


class BuildNative(build_ext):
    """A plain shared library, each source with flags of its own."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources two at a time, then link them."""
        with ThreadPoolExecutor(2) as workers:
            objects = list(workers.map(self.compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread"], target_lang="c++"
        )

    def compile_one(self, source: str) -> str:
        """Compile one file; if the compiler cannot, without its instruction set and more plainly.

        An object that is newer than everything it may depend on is taken as it is.
        """
        stem = Path(source).stem
        made = Path(OBJECTS, source).with_suffix(".o")
        if not newer_group([source, *HEADERS, __file__], str(made)):
            return str(made)
        for flags in (flags_of(stem), PLAINER):
            try:
                return self.compiler.compile(
                    [source], output_dir=OBJECTS, extra_postargs=[*COMMON, *flags]
                )[0]
            except CompileError as error:
                failure = error
        raise failure

    def get_ext_filename(self, fullname: str) -> str:
        """A name without the Python version: the library knows nothing of Python."""
        return str(Path(*fullname.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "opsin.kernels.cpu._native",
            sources=[str(path) for path in sorted(SOURCE.glob("*.cpp"))],
            depends=HEADERS,
            language="c++",
            optional=True,
        )
    ],
)
