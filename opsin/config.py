"""The environment, read in this one place: every `OPSIN_*` variable as a typed value.

What belongs to the hub (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`...) is left to `huggingface_hub`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from opsin.errors import InputError

LOG_LEVELS = ("debug", "info", "warning", "error")
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says, with the defaults filled in.

    cache: where Opsin keeps what it can make again (`OPSIN_CACHE`, default a folder of the user's
    cache); cpu_isa: the instruction set the native kernels are held to (`OPSIN_CPU_ISA`, default:
    the best one found); num_threads: threads of CPU arithmetic (`OPSIN_NUM_THREADS`, default: one
    a core); log_level: `OPSIN_LOG_LEVEL`, one of debug, info, warning, error;
    repacked_cache: where packed weights are kept to be mapped the next time
    (`OPSIN_REPACKED_CACHE`): auto, on, off or a folder.
    """

    cache: Path
    cpu_isa: str | None = None
    num_threads: int | None = None
    log_level: str = "warning"
    repacked_cache: str = AUTO

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """The settings that the variables give; InputError where a value cannot be meant."""
        return cls(
            cache=_cache_folder(environ),
            cpu_isa=_text(environ, "OPSIN_CPU_ISA"),
            num_threads=_count(environ, "OPSIN_NUM_THREADS"),
            log_level=_choice(environ, "OPSIN_LOG_LEVEL", LOG_LEVELS, "warning"),
            repacked_cache=environ.get("OPSIN_REPACKED_CACHE", "").strip() or AUTO,
        )


@functools.cache
def settings() -> Settings:
    """The process's settings, read at the first call and the same ever after."""
    return Settings.read(os.environ)


def repacked_folder(named: str | Path | None = None) -> Path | None:
    """The folder in which packed weights are kept; None: they are not.

    `named` is "auto" or "on", for a folder within the cache, "off", or a folder; None is what the
    settings say.
    """
    named = settings().repacked_cache if named is None else named
    if str(named) == "off":
        return None
    own = str(named) in (AUTO, "on")
    return settings().cache / "repacked" if own else Path(named).expanduser()


def keeps_unasked(named: str | Path | None = None) -> bool:
    """Whether packed weights are kept only where that costs little, as nobody asked for it."""
    return str(settings().repacked_cache if named is None else named) == AUTO


def variables(names: Iterable[str]) -> dict[str, str]:
    """Those of the named variables that are set, as they stand."""
    return {name: os.environ[name] for name in names if name in os.environ}


def _text(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(name, "").strip().lower() or None


def _cache_folder(environ: Mapping[str, str]) -> Path:
    if named := environ.get("OPSIN_CACHE", "").strip():
        return Path(named).expanduser()
    if base := environ.get("XDG_CACHE_HOME", "").strip():
        return Path(base).expanduser() / "opsin"
    return Path.home() / ".cache" / "opsin"


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = _text(environ, name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InputError(
            f"{name}={value} cannot be used",
            why="it is not a whole number above zero",
            remedy=f"Set {name} to a number such as 4, or unset it",
            param=name,
        )
    return int(value)


def _choice(environ: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = _text(environ, name) or default
    if value not in choices:
        raise InputError(
            f"{name}={value} cannot be used",
            why="it is not a known value",
            remedy=f"Set {name} to one of {', '.join(choices)}",
            param=name,
        )
    return value
