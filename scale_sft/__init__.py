"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes, with the same result."""

__version__ = "0.1.0"
