"""This trainer beside what one would use instead: same model, data, dtype, batch and machine, in one run."""
