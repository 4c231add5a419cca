"""The model list as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from opsin.engine.model import describe
from opsin.server.manager import Loaded, Manager, listed_models


def entry(name: str, created: int, loaded: Loaded | None) -> dict[str, Any]:
    """One model: OpenAI's fields, and ours for what is loaded."""
    value: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "opsin",
        "loaded": loaded is not None,
    }
    if loaded is not None:
        value |= describe(loaded.model)
        value["max_model_len"] = loaded.engine.max_context
    return value


def render(manager: Manager) -> dict[str, Any]:
    """All models that a request may name."""
    data = [entry(name, created, manager.find(name)) for name, created, _ in listed_models(manager)]
    return {"object": "list", "data": data}
