"""A check of every model type that transformers has: `python -m tools.models_check`."""
