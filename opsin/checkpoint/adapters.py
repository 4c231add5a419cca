"""Low-rank adapters that lie in folders of their own within a checkpoint's, in PEFT's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsin.checkpoint.safetensors import StoredTensor, stored_tensors
from opsin.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT's that change the arithmetic, and the values at which they do not.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "peft_type": ("LORA", None),
    "rank_pattern": ({}, None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
}


def check_adapter(name: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless an adapter_config.json describes a plain low-rank adapter."""
    odd = [key for key, plain in PLAIN.items() if config.get(key) not in plain]
    sizes = (config.get("r"), config.get("lora_alpha"))
    if odd or not all(isinstance(size, int | float) and size > 0 for size in sizes):
        stated = f"it states {odd[0]} {config[odd[0]]!r}" if odd else "r or lora_alpha is missing"
        raise CheckpointError(
            f"The adapter {name} of the checkpoint cannot be read",
            why=stated,
            remedy="Merge it into the weights",
        )


def adapter_tensors(folder: Path, names: Mapping[str, str]) -> list[StoredTensor]:
    """The tensors of adapters, called as if they lay within the model's own weights.

    names: for each folder within `folder`, what its adapter is called there. Raises CheckpointError
    where one has no weights.
    """
    found: list[StoredTensor] = []
    for inside, name in names.items():
        path = folder / inside / WEIGHTS
        if not path.is_file():
            raise CheckpointError(
                f"The checkpoint {folder.name} is incomplete",
                why=f"{inside} holds no {WEIGHTS}",
                remedy="Download it again",
            )
        for tensor in stored_tensors(path):
            plain = tensor.name.removeprefix("base_model.model.")
            within = re.sub(r"\.lora_(A|B)\.weight$", rf".lora_\1.{name}.weight", plain)
            found.append(replace(tensor, name=within))
    return found
