"""What `opsin serve` can be told, once: flags, environment variables and configuration files are
all read from this table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from opsin.errors import InputError
from opsin.media.limits import DEFAULT_LIMITS, MediaLimits

Kind: TypeAlias = Literal["text", "count", "number", "bytes", "switch", "list"]
ON_DEMAND = ("cached", "any", "never")
SPECULATIVE = ("ngram",)
LOG_LEVELS = ("debug", "info", "warning", "error")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?(i)?b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Flag:
    """How one setting is written: its kind, help, group on the help page, and other spellings."""

    kind: Kind
    help: str
    panel: str
    names: tuple[str, ...] = ()
    low: float = 0
    high: float = float("inf")
    choices: tuple[str, ...] = ()


def _flag(default: Any, kind: Kind, panel: str, text: str, *names: str, **bounds: Any) -> Any:
    flag = Flag(kind, text, panel, names, **bounds)
    return dataclasses.field(default=default, metadata={"flag": flag})


MODEL, ENGINE, MEDIA, ACCESS, REQUESTS = "Model", "Engine", "Media", "Access", "Requests"


@dataclass(frozen=True)
class ServeSettings:
    """Every setting of a server, with its default; `flags()` says how each is written."""

    model: str | None = _flag(None, "text", MODEL, "Model to load at the start.", "-m")
    served_model_name: tuple[str, ...] = _flag(
        (), "list", MODEL, "Names that this model answers to. Repeatable."
    )
    load_on_demand: str = _flag(
        "cached",
        "text",
        MODEL,
        "Which other models a request may load: cached, any (downloads), never.",
        choices=ON_DEMAND,
    )
    max_models: int = _flag(1, "count", MODEL, "Models kept loaded, memory permitting.", low=1)
    unload_after: float | None = _flag(
        None, "number", MODEL, "Unload a model unused for so many seconds."
    )
    device: str | None = _flag(None, "text", MODEL, "cpu, cuda, cuda:N or mps; the best there is.")
    dtype: str | None = _flag(
        None, "text", MODEL, "float32, bfloat16 or float16; the checkpoint's by default."
    )
    quant: int | None = _flag(
        None, "count", MODEL, "Quantise to 8 or 4 bits while loading.", "--isq", low=4
    )
    repacked_cache: str | None = _flag(
        None,
        "text",
        MODEL,
        "Keep the weights as the CPU reads them, to load sooner: auto, on, off or a folder.",
    )
    revision: str | None = _flag(None, "text", MODEL, "Branch, tag or commit of --model.")
    chat_template: str | None = _flag(
        None, "text", MODEL, "A jinja file, JSON holding one, or a template's name.", "-c"
    )
    matformer_slice: str | None = _flag(
        None, "text", MODEL, "Load a smaller model within --model, by its name in the table."
    )
    matformer_config: str | None = _flag(
        None, "text", MODEL, "A CSV file of slices; the table of the model's family by default."
    )

    max_num_seqs: int = _flag(64, "count", ENGINE, "Requests computed at once.", low=1)
    max_queue: int = _flag(256, "count", ENGINE, "Requests that may wait; more get 429.", low=1)
    memory: int | None = _flag(
        None, "bytes", ENGINE, "Memory of the key-value cache, such as 8GB.", low=1
    )
    prefix_cache: bool = _flag(
        True, "switch", ENGINE, "Keep what prompts computed, for those that begin the same."
    )
    media_cache: int = _flag(2**28, "bytes", ENGINE, "Memory for pictures already encoded.")
    prepared_cache: int = _flag(2**27, "bytes", ENGINE, "Memory for media ready to be encoded.")
    fetched_cache: int = _flag(2**27, "bytes", ENGINE, "Memory for media fetched from URLs.")
    kv_bits: int | None = _flag(
        None, "count", ENGINE, "Bits of cached keys and values: 16, 8 or 4; 16 by default."
    )
    kv_group_size: int = _flag(
        64, "count", ENGINE, "Cached values that share a scale below 16 bits: 32, 64 or 128."
    )
    quantized_kv_start: int = _flag(
        5000, "count", ENGINE, "Tokens of each request that stay at 16 bits, to a whole block."
    )
    max_kv_size: int | None = _flag(
        None, "count", ENGINE, "Tokens that the next one sees: the first 4 and the last; all."
    )
    speculative: str | None = _flag(
        None,
        "text",
        ENGINE,
        "ngram: guess from what was said before; the same answers, sooner where they repeat.",
        choices=SPECULATIVE,
    )
    prefill_step_size: int = _flag(2048, "count", ENGINE, "Prompt tokens computed at once.", low=1)
    max_context: int | None = _flag(
        None, "count", ENGINE, "Tokens of prompt and answer; the model's by default.", low=2
    )

    media_root: tuple[str, ...] = _flag(
        (), "list", MEDIA, "A folder that local files may be read from. Repeatable."
    )
    allow_media_domain: tuple[str, ...] = _flag(
        (), "list", MEDIA, "Fetch only from this host and its subdomains. Repeatable."
    )
    allow_private_media: bool = _flag(
        False, "switch", MEDIA, "Fetch from private and loopback addresses too."
    )
    max_media_bytes: int = _flag(
        DEFAULT_LIMITS.max_bytes, "bytes", MEDIA, "Bytes of one download or file.", low=1
    )
    max_image_pixels: int = _flag(
        DEFAULT_LIMITS.max_pixels, "count", MEDIA, "Pixels of one picture.", low=1
    )
    max_video_frames: int = _flag(
        DEFAULT_LIMITS.max_frames, "count", MEDIA, "Frames of one video.", low=1
    )
    max_video_pixels: int = _flag(
        DEFAULT_LIMITS.max_video_pixels, "count", MEDIA, "Pixels of one video's frames.", low=1
    )
    max_pages: int = _flag(
        DEFAULT_LIMITS.max_pages, "count", MEDIA, "Pages of one request's documents.", low=1
    )
    max_audio_seconds: float = _flag(
        DEFAULT_LIMITS.max_audio_seconds, "number", MEDIA, "Length of one sound.", low=0.001
    )
    media_timeout: float = _flag(
        30.0, "number", MEDIA, "Seconds to fetch and decode one item.", low=0.001
    )
    media_threads: int = _flag(8, "count", MEDIA, "Media prepared at once.", low=1)
    max_media: int = _flag(64, "count", MEDIA, "Pictures, sounds and videos of one request.")

    host: str = _flag("0.0.0.0", "text", ACCESS, "Address to listen on.")
    port: int = _flag(8080, "count", ACCESS, "Port to listen on.", "-p", high=65535)
    api_key: tuple[str, ...] = _flag(
        (), "list", ACCESS, "A key that clients must send, or @FILE with one a line. Repeatable."
    )
    cors_origin: tuple[str, ...] = _flag(
        (), "list", ACCESS, "An origin whose web pages may call; * for any. Repeatable."
    )
    allowed_host: tuple[str, ...] = _flag(
        (), "list", ACCESS, "Another Host header to answer to without a key. Repeatable."
    )

    max_tokens: int = _flag(4096, "count", REQUESTS, "Answer length where none is asked.", low=1)
    timeout: float = _flag(600.0, "number", REQUESTS, "Seconds one request may take.", low=0.001)
    max_body_bytes: int = _flag(128 * 2**20, "bytes", REQUESTS, "Bytes of one body.", low=1)
    max_n: int = _flag(16, "count", REQUESTS, "Answers that one request may ask for.", low=1)
    max_stored: int = _flag(256, "count", REQUESTS, "Responses kept for each key.")
    allow_request_templates: bool = _flag(
        False, "switch", REQUESTS, "Let a request bring its own chat template."
    )
    drain_timeout: float = _flag(
        30.0, "number", REQUESTS, "Seconds that running requests get when the server stops."
    )
    log_level: str = _flag(
        "info", "text", REQUESTS, "debug, info, warning or error.", choices=LOG_LEVELS
    )

    def media_limits(self) -> MediaLimits:
        """What media may cost and where they may come from: no local file unless a root is
        given.
        """
        return MediaLimits(
            max_bytes=self.max_media_bytes,
            max_pixels=self.max_image_pixels,
            max_frames=self.max_video_frames,
            max_video_pixels=self.max_video_pixels,
            max_pages=self.max_pages,
            max_audio_seconds=self.max_audio_seconds,
            deadline=self.media_timeout,
            media_root=self.media_root,
            allowed_domains=self.allow_media_domain or None,
            allow_private_addresses=self.allow_private_media,
        )

    def keys(self) -> tuple[str, ...]:
        """The API keys, those in files included; an empty one is refused."""
        found: list[str] = []
        for given in self.api_key:
            found += _key_file(Path(given[1:])) if given.startswith("@") else [given]
        if self.api_key and (not found or not all(key.strip() for key in found)):
            raise InputError(
                "An API key is empty", remedy="Give --api-key a value", param="api_key"
            )
        return tuple(found)


def _key_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"The key file {path.name} cannot be read",
            why=type(error).__name__,
            remedy="Give --api-key @FILE with one key a line",
            param="api_key",
        ) from None
    return [line.strip() for line in lines if line.strip()]


def flags() -> Iterator[tuple[str, Any, Flag]]:
    """Every setting: its name, its default and how it is written."""
    for item in dataclasses.fields(ServeSettings):
        yield item.name, item.default, item.metadata["flag"]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"OPSIN_{name.upper()}"


VARIABLES = tuple(variable(item.name) for item in dataclasses.fields(ServeSettings))


def read_settings(
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, Any],
) -> ServeSettings:
    """Settings from flags, before environment variables, before a file, before defaults.

    Raises InputError naming the flag, the variable or the key whose value cannot be meant.
    """
    known = {name: flag for name, _, flag in flags()}
    keys = {key.replace("-", "_"): value for key, value in file.items()}
    for key in keys:
        if key not in known:
            raise InputError(
                f"The configuration file has the unknown key {key[:60]!r}",
                remedy="`opsin serve --help` lists the flags; keys are their names",
                param=key,
            )
    values: dict[str, Any] = {}
    for name, flag in known.items():
        if given.get(name) is not None and given[name] != []:
            values[name] = _parsed(flag, given[name], "--" + name.replace("_", "-"))
        elif variable(name) in environment:
            values[name] = _parsed(flag, environment[variable(name)], variable(name))
        elif keys.get(name) is not None:
            values[name] = _parsed(flag, keys[name], name)
    return ServeSettings(**values)


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file."""
    import yaml  # type: ignore[import-untyped]

    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"The configuration file {path.name} cannot be read",
            why=str(error) if isinstance(error, yaml.YAMLError) else type(error).__name__,
            param="config",
        ) from None
    if held is None:
        return {}
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise InputError(
            f"The configuration file {path.name} holds no settings",
            remedy="Write a line such as `port: 8080` for each",
            param="config",
        )
    return held


def _parsed(flag: Flag, value: Any, where: str) -> Any:
    """A value in its setting's type, whichever way it was written."""
    if flag.kind == "switch":
        return _switch(value, where)
    if flag.kind == "list":
        items = value.split(",") if isinstance(value, str) else value
        items = items if isinstance(items, list | tuple) else [items]
        texts = tuple(str(item).strip() for item in items)
        if not all(texts):  # an empty key or origin is a mistake in a script, never a wish
            raise _refused(where, value, "it is empty")
        return texts
    if flag.kind == "text":
        text = str(value).strip()
        if flag.choices and text not in flag.choices:
            raise _refused(where, value, f"it is one of {', '.join(flag.choices)}")
        return text or None
    number = _number(flag.kind, value, where)
    if not flag.low <= number <= flag.high:
        raise _refused(where, value, f"it lies between {flag.low:g} and {flag.high:g}")
    return number


def _switch(value: Any, where: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False, "": False}
    if isinstance(value, bool):
        return value
    if str(value).strip().lower() not in words:
        raise _refused(where, value, "it is true or false")
    return words[str(value).strip().lower()]


def _number(kind: Kind, value: Any, where: str) -> float:
    text = str(value).strip()
    if kind == "bytes" and (match := _SIZE.fullmatch(text)):
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** _POWERS[(match[2] or "").lower()])
    try:
        number = int(text) if kind in ("count", "bytes") else float(text)
    except ValueError:
        wanted = {"count": "a whole number", "bytes": "a size such as 8GB"}.get(kind, "a number")
        raise _refused(where, value, f"it must be {wanted}") from None
    if number != number:
        raise _refused(where, value, "it must be a number")
    return number


def _refused(where: str, value: Any, why: str) -> InputError:
    return InputError(f"{where} cannot be {str(value)[:80]!r}", why=why, param=where)
