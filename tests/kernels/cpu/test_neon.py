"""The NEON kernels give the portable ones' bits: built for ARM and run by QEMU, where both are."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[3]
COMPARISON = Path(__file__).parent / "neon"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
LONGEST = ("isa_neon", "isa_portable")  # to compile: they begin first, side by side
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def compile_all(jobs: dict[Path, list[str]]) -> None:
    """Compile objects, each from its arguments."""

    def compile_one(job: tuple[Path, list[str]]) -> None:
        target, arguments = job
        subprocess.run([str(COMPILER), *arguments, "-c", "-o", str(target)], check=True)

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(compile_one, jobs.items()))


def build(folder: Path) -> Path:
    """The comparison, with the library as setup.py compiles it for ARM."""
    with patch("setuptools.setup"), patch("platform.machine", return_value="aarch64"):
        script = runpy.run_path(str(ROOT / "setup.py"))
        sources = sorted((ROOT / script["SOURCE"]).glob("*.cpp"))
        flags = {path: [*script["COMMON"], *script["flags_of"](path.stem)] for path in sources}
    assert any("dotprod" in flag for own in flags.values() for flag in own)
    flags = dict(sorted(flags.items(), key=lambda item: item[0].stem not in LONGEST))
    jobs = {folder / f"{path.stem}.o": [*own, str(path)] for path, own in flags.items()}
    for path in COMPARISON.glob("*.cpp"):
        include = f"-I{ROOT / script['SOURCE']}"
        jobs[folder / f"compare_{path.stem}.o"] = ["-std=c++17", "-O1", include, str(path)]
    compile_all(jobs)
    program = folder / "compare"
    link = [str(COMPILER), "-static", "-pthread", *map(str, jobs), "-o", str(program)]
    subprocess.run(link, check=True)
    return program


def emulate(processor: str, program: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    """Run the comparison on an emulated processor."""
    command = [str(EMULATOR), "-cpu", processor, str(program), *cases]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not COMPILER or not EMULATOR, reason="no cross compiler or no QEMU for ARM")
def test_neon_is_chosen_and_gives_the_portable_bits(tmp_path: Path):
    program = build(tmp_path)
    chosen = {"max": "neon", "cortex-a76": "neon", "cortex-a72": "portable"}
    for processor, best in chosen.items():
        assert emulate(processor, program).stdout.split()[0] == best, processor
    for processor, cases in (("max", ["all"]), ("cortex-a76", ["whole_numbers", "rounding"])):
        done = emulate(processor, program, *cases)
        assert done.returncode == 0, f"{processor}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    assert emulate("cortex-a72", program, "whole_numbers").returncode != 0, "NEON is not chosen"
