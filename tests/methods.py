"""Methods by their options, for tests that do not hold for the defaults of a name."""

ESTIMATED = {"method": "static", "score": "gradient", "draw": "top", "selection_batches": 0}
"""Fixed entries of the largest gradients, chosen at the end of the first estimation phase as SFT-AG chooses its own."""
