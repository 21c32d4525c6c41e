"""The device that a benchmark measures."""

from __future__ import annotations

import torch


def this_device() -> torch.device:
    """Return this process's GPU with its index, without which some of torch.cuda's functions fail; or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
