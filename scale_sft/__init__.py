"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes, with the same result."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`scale_sft.load_adapter` without importing torch before it is asked for."""
    if name == "load_adapter":
        from .swap import load_adapter

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
