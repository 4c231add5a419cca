"""Lets the reference use torchvision beside a torch that it was not compiled for.

Some reference classes (Llama 4's and Phi-4-multimodal's image processors, Gemma 3n's tower through
timm) import torchvision, of which they use plain torch code only. Its compiled operators do not
load beside a CPU build of torch, and its import then stops where it looks two of them up by name:
declaring those is enough, they are never called.

An installed torchvision that cannot be imported would break Transformers for everybody else in the
same environment, so it may lie in a folder of its own, which only these tests read:

    pip install --no-deps --target <prefix>/oracle-packages "torchvision==0.28.*" timm

where <prefix> is what `python -c "import sys; print(sys.prefix)"` prints.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

# The library lives as long as the process, or torch would take the declaration back.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> bool:
    """Declare what the import looks for; False where torchvision is not installed."""
    folder = Path(sys.prefix) / "oracle-packages"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    if importlib.util.find_spec("torchvision") is None:
        return False
    for name in ("nms", "qnms"):
        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
