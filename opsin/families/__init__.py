"""One file per family of models; the index says which file a checkpoint's `model_type` means."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsin.errors import UnknownFamily
from opsin.families.index import ALIASES, BY_ARCHITECTURE, BY_TOWER, MODULES
from opsin.families.mlx_table import NAMES

if TYPE_CHECKING:
    from opsin.families.base import Family

__all__ = ["bundled_template", "bundled_templates", "find", "load", "model_types"]

DATA = Path(__file__).with_name("data")


def model_types() -> list[str]:
    """Every `model_type` that has a family, aliases included."""
    return sorted({*MODULES, *ALIASES})


def find(model_type: str) -> type[Family]:
    """The family class of a `model_type`.

    Raises UnknownFamily, with the nearest known names, if there is none.
    """
    name = ALIASES.get(model_type, model_type)
    if name not in MODULES:
        close = difflib.get_close_matches(model_type, model_types(), n=3)
        hint = f"the nearest that are: {', '.join(close)}" if close else ""
        raise UnknownFamily(
            f"Models of type {model_type!r} are not supported",
            why=hint,
            remedy="`opsin models` lists the supported families",
            param="model",
        )
    module = importlib.import_module(f"opsin.families.{MODULES[name]}")
    family: type[Family] = module.FAMILY
    return family


def load(config: dict[str, Any], processor_config: dict[str, Any]) -> Family:
    """The family of a checkpoint, holding its configs."""
    model_type = config["model_type"]
    vision = config.get("vision_config") or {}
    tower = vision.get("cls") or vision.get("model_type", "")
    for architecture in config.get("architectures") or ():
        model_type = BY_ARCHITECTURE.get(architecture, model_type)
    name = BY_TOWER.get((model_type, tower), model_type)
    family = find(name)(config, processor_config)
    family.mlx_names = NAMES.get(MODULES[ALIASES.get(name, name)])
    if family.mlx_names is not None:
        family.rename = (*family.mlx_names.reading(), *family.rename)
    return family


def bundled_templates() -> list[str]:
    """The names of the chat templates that come with the package."""
    return sorted(path.stem for path in DATA.glob("*.jinja"))


def bundled_template(name: str) -> str | None:
    """The text of a chat template that comes with the package, or None if none has that name."""
    path = DATA / f"{name}.jinja"
    if not re.fullmatch(r"[a-z0-9_]+", name) or not path.is_file():
        return None
    return path.read_text(encoding="utf-8")
