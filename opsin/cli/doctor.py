"""What this machine offers to Opsin, what is missing, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

import typer

from opsin.errors import OpsinError

# The optional extras: what each adds, and the package that shows it is there.
EXTRAS = {
    "transformers": ("transformers", "families that Opsin has no file for, on a slower path"),
    "ui": ("gradio", "the chat page"),
    "ray": ("ray", "several machines"),
}
# The processor features that choose a kernel, as the kernel names them.
CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
PROBE_BYTES = 1 << 28  # larger than any cache, small enough to read several times in a second
PROBE_REPEATS = 4
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: whether it is as it should be, what was found, what to do if not.

    `required` tells what Opsin cannot do without from what only adds something.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = False


def report() -> list[Check]:
    """Every check, in the order to read them; takes about two seconds."""
    looks = (
        _python, _torch, _processor, _memory, _native_kernels, _memory_bandwidth, _gpu,
        _ffmpeg_libraries, _bundled_model, _hub_cache,
    )  # fmt: skip
    return [_guarded(look) for look in looks] + [_extra(name) for name in EXTRAS]


def _guarded(look: Callable[[], Check]) -> Check:
    """The check, or what kept it from being made: a broken install is just what is looked for."""
    name = look.__name__.strip("_").replace("_", " ")
    try:
        return look()
    except OpsinError as error:
        return Check(name, False, error.why or error.what, error.remedy, required=True)
    except (ImportError, OSError, RuntimeError) as error:
        line = " ".join(str(error).split())
        remedy = "Reinstall Opsin in a new virtual environment"
        return Check(name, False, f"{type(error).__name__}: {line}", remedy, required=True)


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    remedy = "" if good else "Install Python 3.11 or later"
    where = f"{platform.system()} {platform.machine()}"
    detail = f"{platform.python_version()} on {where}, Opsin {_version('opsin')}"
    return Check("python", good, detail, remedy, required=True)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "from source"


def _torch() -> Check:
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    good = (2, 11) <= (major, minor) < (2, 14)
    remedy = "" if good else "Install a version that works: pip install 'torch>=2.11,<2.14'"
    threads = f"{torch.get_num_threads()} threads"
    return Check("torch", good, f"{torch.__version__}, {threads}", remedy, required=True)


def _processor() -> Check:
    from opsin.kernels.cpu import physical_cores

    described = _cpuinfo()
    name = described.get("model name") or platform.processor() or platform.machine()
    flags = set((described.get("flags") or described.get("features") or "").split())
    features = " ".join(feature for feature in CPU_FEATURES if feature in flags)
    cores = physical_cores()
    detail = f"{name}, {cores} core{'s' if cores != 1 else ''}"
    return Check("processor", True, f"{detail}, {features}" if features else detail)


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of the kernel's description, {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available()
    detail = f"{total / GIB:.1f} GiB"
    if free is not None:
        detail += f", {free / GIB:.1f} GiB available"
    good = total >= 2 * GIB
    remedy = "" if good else "Models of 256M parameters are the largest to try here"
    return Check("memory", good, detail, remedy)


def _available() -> int | None:
    """Bytes that can be had without swapping, None where the kernel does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _memory_bandwidth() -> Check:
    gigabytes = read_bandwidth() / 1e9
    detail = f"{gigabytes:.1f} GB/s of reads, all cores: decoding one answer goes no faster"
    return Check("memory bandwidth", True, detail)


def read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the best of a few short tries."""
    from opsin.kernels import cpu

    library = cpu.load()
    if library is not None:
        return library.read_bandwidth(PROBE_BYTES, PROBE_REPEATS)
    return _read_bandwidth_without_kernels(cpu.physical_cores())


def _read_bandwidth_without_kernels(threads: int) -> float:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = np.array_split(np.ones(PROBE_BYTES // 8, dtype=np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PROBE_REPEATS):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return PROBE_BYTES / best


def _native_kernels() -> Check:
    from opsin.kernels import cpu

    library = cpu.load()
    if library is not None:
        return Check("native kernels", True, f"{cpu.isa()}, {library.threads} threads")
    remedy = "Install a C++17 compiler, then install Opsin again"
    return Check("native kernels", False, cpu.why_missing(), remedy)


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        detail = ", ".join(f"{card.name} ({card.total_memory / GIB:.0f} GiB)" for card in cards)
        return Check("gpu", True, detail)
    if torch.backends.mps.is_available():
        return Check("gpu", True, "Apple GPU")
    if shutil.which("nvidia-smi"):
        remedy = "Install the CUDA build of torch that fits the driver nvidia-smi shows"
        return Check("gpu", False, "an NVIDIA driver is here, but torch cannot use it", remedy)
    return Check("gpu", True, "none, the processor does all the work")


def _ffmpeg_libraries() -> Check:
    import av

    versions = ", ".join(
        f"{name} {'.'.join(map(str, version))}"
        for name, version in sorted(av.library_versions.items())
        if name in {"libavcodec", "libavformat", "libswscale", "libswresample"}
    )
    return Check("ffmpeg libraries", True, f"PyAV {av.__version__}: {versions}", required=True)


def _bundled_model() -> Check:
    from opsin.checkpoint import hub

    return Check("bundled model", True, hub.resolve(hub.BUNDLED).name + " is here")


def _hub_cache() -> Check:
    from opsin.checkpoint import hub

    folder, is_offline = hub.cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    offline = ", offline (HF_HUB_OFFLINE)" if is_offline else ""
    good = free > 5 * GIB
    remedy = "" if good else "Free some space, or point HF_HOME to another disk"
    return Check("hub cache", good, f"{folder}, {free / GIB:.0f} GiB free{offline}", remedy)


def _extra(name: str) -> Check:
    module, purpose = EXTRAS[name]
    if util.find_spec(module) is not None:
        return Check(f"extra: {name}", True, f"{module} {_version(module)}")
    return Check(
        f"extra: {name}", False, f"not installed: {purpose}", f"pip install 'opsin[{name}]'"
    )


def render(checks: Iterable[Check]) -> str:
    """The report as text, a line a check and the remedy under what is missing."""
    lines = []
    for check in checks:
        mark = "ok" if check.ok else "missing" if check.required else "-"
        lines.append(f"{mark:<8}{check.name:<20}{check.detail}")
        if check.remedy:
            lines.append(f"{'':<28}{check.remedy}")
    return "\n".join(lines)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Show what this machine offers, what is missing, and how to get it."""
    checks = report()
    typer.echo(json.dumps([asdict(c) for c in checks], indent=2) if as_json else render(checks))
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(1)
