"""`python -m scale_sft.cli`."""

from .main import main

if __name__ == "__main__":
    main()
