"""Open vision-language models on one machine: pictures, video, sound and text in; text out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from opsin.api import (
        GenerationResult,
        apply_chat_template,
        batch_generate,
        generate,
        generate_step,
        get_message_json,
        load,
        prepare_inputs,
        stream_generate,
    )
    from opsin.api_quantize import Written, quantize
    from opsin.engine.loop import Engine
    from opsin.errors import OpsinError
    from opsin.prompt.formats import MessageFormat
    from opsin.types import SamplingParams

__all__ = [
    "Engine",
    "GenerationResult",
    "MessageFormat",
    "OpsinError",
    "SamplingParams",
    "Written",
    "apply_chat_template",
    "batch_generate",
    "generate",
    "generate_step",
    "get_message_json",
    "load",
    "prepare_inputs",
    "quantize",
    "stream_generate",
]

_HOMES = {
    "Engine": "opsin.engine.loop",
    "MessageFormat": "opsin.prompt.formats",
    "OpsinError": "opsin.errors",
    "SamplingParams": "opsin.types",
    "Written": "opsin.api_quantize",
    "quantize": "opsin.api_quantize",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import opsin` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "opsin.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
