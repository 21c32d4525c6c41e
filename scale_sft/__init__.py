"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes, with the same result."""

from scale_sft.version import __version__ as __version__


def __getattr__(name: str):
    """`scale_sft.load_adapter` without importing torch before it is asked for."""
    if name == "load_adapter":
        from scale_sft.adapters.live import load_adapter

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
