"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes, with the same result.

    >>> sparse = scale_sft.attach(model, density=0.01, total_steps=1000)
    >>> optimizer = sparse.optimizer(lr=1e-2)

Public names are imported when they are first used; `import scale_sft` alone loads nothing heavy.
"""

from scale_sft.version import __version__ as __version__

_PUBLIC = {
    "SparseModel": "scale_sft.model.sparse_model",
    "SparseOptimizer": "scale_sft.model.sparse_optimizer",
    "UserError": "scale_sft.errors",
    "attach": "scale_sft.api",
    "load_adapter": "scale_sft.adapters.live",
}
"""Module of each public name."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
