"""The JSON files of a checkpoint folder, read as plain dictionaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opsin.errors import CheckpointError, NotFoundError


class Config(dict[str, Any]):
    """A config.json whose top level also reads as attributes, `config.model_type`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the config has no {name!r}")


def read_value(path: Path) -> Any:
    """The value in a JSON file, None if there is no such file; CheckpointError if it is broken."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path.parent.name}/{path.name}",
            why=f"it is not valid JSON ({error})",
            remedy="Download it again, or mend it",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file; CheckpointError if it is another."""
    value = read_value(path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Cannot read {path.parent.name}/{path.name}",
            why="it does not hold a JSON object",
            remedy="Download it again, or mend it",
        )
    return value


def read_config(folder: Path) -> Config:
    """A checkpoint's config.json, which must be there and name a `model_type`.

    The adapter_config.json of folders within it are under "adapter_configs", by folder.
    """
    config = read_json(folder / "config.json")
    if not (folder / "config.json").is_file():
        raise NotFoundError(
            f"There is no checkpoint in {folder.name}",
            why="the folder has no config.json",
            remedy="Name a folder or hub model that holds config.json and safetensors weights",
            param="model",
        )
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"The checkpoint {folder.name} does not say what it is",
            why="its config.json has no model_type",
            remedy="Use the config.json that the model's authors published",
        )
    adapters = {path.parent.name: read_json(path) for path in folder.glob("*/adapter_config.json")}
    return Config({**config, "adapter_configs": adapters} if adapters else config)


def read_processor_config(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json and processor_config.json as one dictionary.

    Transformers 5 nests the image processor's settings in processor_config.json; here they lie flat
    under the same names, and whatever else the processor states beside them. Those of a video
    processor of its own are under "video_processor", the path of a font beside them its
    "font_file".
    """
    processor = read_json(folder / "processor_config.json")
    nested = processor.pop("image_processor", {})
    video = processor.pop("video_processor", None)
    video = video or read_json(folder / "video_preprocessor_config.json")
    merged = {**processor, **nested, **read_json(folder / "preprocessor_config.json")}
    if not video:
        return merged
    font = folder / Path(str(video.get("font") or "-")).name
    return {
        **merged,
        "video_processor": {**video, "font_file": str(font)} if font.is_file() else video,
    }
