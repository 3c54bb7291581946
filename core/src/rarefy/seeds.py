"""Everything random comes from the recipe's seed."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *labels: str | int) -> int:
    """Return a seed below 2**31 for one purpose, the same on every platform."""
    text = ":".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
