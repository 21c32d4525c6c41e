"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes, with the same result.

Adapter        the result of a run: load, inspect, save
load_adapter   apply an adapter to a model in memory, swap it while the model serves, undo it
merge          write base + adapter as a plain transformers folder
UserError      what all of them raise for input that cannot work

Names are imported when they are first used: `import scale_sft` alone loads no torch.
"""

from importlib import import_module
from typing import Any

from scale_sft.version import __version__ as __version__

_PUBLIC = {
    "Adapter": "scale_sft.adapters.format",
    "UserError": "scale_sft.errors",
    "load_adapter": "scale_sft.adapters.live",
    "merge": "scale_sft.adapters.merge",
}
"""Module of each public name."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
