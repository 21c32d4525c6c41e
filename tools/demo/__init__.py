"""Scripts that made the demo: its base model and its data."""
