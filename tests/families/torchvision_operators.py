"""Lets torchvision be imported beside a torch it was not compiled for.

Some reference classes (Pixtral's processor, Llama 4's and Phi-4-multimodal's image processors,
Gemma 3n's tower through timm) import torchvision, of which they use plain torch code only. Its
compiled operators do not load beside a CPU build of torch, and its import then stops where it looks
two of them up by name: declaring those is enough, they are never called.
"""

from __future__ import annotations

import importlib.util

import torch

# The library lives as long as the process, or torch would take the declaration back.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> bool:
    """Declare what the import looks for; False where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    for name in ("nms", "qnms"):
        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
