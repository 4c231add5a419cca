"""The kernel tests pass under the address and undefined-behaviour sanitisers."""

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.kernels.cpu.conftest import INSTRUCTION_SETS

ROOT = Path(__file__).parents[3]
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fPIC",
         "-fno-sanitize-recover=undefined", "-std=c++17", "-ffp-contract=off", "-w"]  # fmt: skip


def runtime(compiler: str) -> str | None:
    """Where the compiler keeps the address sanitiser's library."""
    answer = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    path = Path(answer.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


def flags_by_file() -> dict[str, list[str]]:
    """The instruction-set flags that setup.py gives each source."""
    with patch("setuptools.setup"):
        script = runpy.run_path(str(ROOT / "setup.py"))
    sources = sorted((ROOT / script["SOURCE"]).glob("*.cpp"))
    return {str(path): script["flags_of"](path.stem) for path in sources}


def build(compiler: str, folder: Path) -> None:
    """The library with sanitisers, in a folder of its own."""

    def compile_one(item: tuple[str, list[str]]) -> str:
        source, flags = item
        target = str(folder / (Path(source).stem + ".o"))
        subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as workers:
        objects = list(workers.map(compile_one, flags_by_file().items()))
    link = [compiler, "-shared", "-fsanitize=address,undefined", "-pthread", *objects]
    subprocess.run([*link, "-o", str(folder / "_native.so")], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_are_clean(tmp_path):
    compiler = shutil.which("g++")
    library = compiler and runtime(compiler)
    if not library or INSTRUCTION_SETS == ["none"]:
        pytest.skip("no compiler with sanitisers, or no native kernels")
    build(compiler, tmp_path)
    script = (
        "import sys, pathlib, pytest, opsin.kernels.cpu.library as library;"
        "library._FOLDER = pathlib.Path(sys.argv[1]);"
        "assert library.load() is not None, library.why_missing();"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-m', 'not slow',"
        " 'tests/kernels/cpu']))"
    )
    environment = os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0,use_sigaltstack=0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
