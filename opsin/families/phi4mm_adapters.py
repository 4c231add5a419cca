"""Where the adapters of Phi-4-multimodal lie.

The authors' weights hold both within, and once more in folders beside them; weights that
Transformers saves hold neither, and are published with the same folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.checkpoint.adapters import check_adapter
from opsin.errors import CheckpointError

ADAPTER_FOLDERS: Mapping[str, str] = {"vision-lora": "vision", "speech-lora": "speech"}


def within(config: Mapping[str, Any]) -> bool:
    """Whether the model's own weights hold the adapters, as its config says."""
    return any(config.get(f"{name}_lora") for name in ADAPTER_FOLDERS.values())


def beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's keys for adapters that lie in folders only; none where there are no folders.

    Raises CheckpointError if one of the two is missing, or is no plain adapter.
    """
    stated = config.get("adapter_configs") or {}
    folders = [folder for folder in ADAPTER_FOLDERS if folder in stated]
    if within(config) or not folders:
        return {}
    for folder, name in ADAPTER_FOLDERS.items():
        if folder not in stated:
            raise CheckpointError(
                "The checkpoint is incomplete",
                why=f"it has {folders[0]} but no {folder}",
                remedy="Download it again",
            )
        check_adapter(name, stated[folder])
    return {f"{name}_lora": stated[folder] for folder, name in ADAPTER_FOLDERS.items()}
