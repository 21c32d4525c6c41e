"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes, with the same result."""

from scale_sft.version import __version__ as __version__


def __getattr__(name: str):
    """Import what is asked for, and torch no sooner."""
    if name == "train":  # the module, which is callable
        from importlib import import_module

        return import_module("scale_sft.train")
    if name == "RunResult":
        from scale_sft.training.result import RunResult

        return RunResult
    if name == "load_adapter":
        from scale_sft.adapters.live import load_adapter

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
