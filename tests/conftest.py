"""What every test runs under: few threads, no hub, the same random numbers each time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Transformers remembers whether torchvision was there when it was first imported.
from tests.families.torchvision_operators import declare

declare()
