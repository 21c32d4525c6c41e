"""Whether Triton's kernels run on a device: the smallest of them is compiled and run there, once per process.

Nothing is measured. On an H200 `picked` beat the plain path by 2 to 8 % for each shape of a 7B model and gave the same
bits, so the rule is to use it wherever it runs. A start costs the compilation of a few kernels, which Triton keeps on
disk.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

_TOKENS, _ROWS, _WIDTH, _ACTIVE = 4, 3, 5, 7


def why_not(device: torch.device) -> str | None:
    """Explain why Triton's kernels cannot be used on a device, or return None if they can.

    A driver or compiler that is missing or too old shows only when a kernel runs, so one does.
    """
    if device.type != "cuda":
        return "they need a GPU"
    if device.index not in (None, torch.cuda.current_device()):  # Triton launches where torch's current stream is
        return f"torch's current GPU is another one. Fix: torch.cuda.set_device({device.index}) first"
    return _why_not(device)


@lru_cache
def _why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        return None if _right(device) else "a kernel gave other numbers than torch"
    except Exception as error:  # a compiler or driver may raise anything; plain torch remains
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _right(device: torch.device) -> bool:
    from .picked import picked_entries

    left, right = (torch.arange(_TOKENS * n, device=device).view(_TOKENS, n).float() for n in (_ROWS, _WIDTH))
    entries = Entries(torch.arange(_ACTIVE, device=device) * 2, (_ROWS, _WIDTH))
    found, expected = torch.zeros(2, _ACTIVE, device=device)
    picked_entries(left, right, [(entries, found)])
    dense_products(left, right, [(entries, expected)])
    return torch.equal(found, expected)
