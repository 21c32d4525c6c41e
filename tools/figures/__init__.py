"""Scripts that draw the pictures of README and docs."""
