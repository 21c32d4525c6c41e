"""Register the method in PEFT's three mappings: its own register_peft_method takes no name outside its enum."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from scale_sft.errors import UserError

from .config import SpielConfig, SpielType

OLDEST = (0, 21)
PREFIX = "spiel_"
_MAPPINGS = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")


def require_version(version: str) -> None:
    """Raise UserError for a PEFT that is too old."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"peft: got {version}, expected {oldest} or newer. Fix: pip install 'peft>={oldest}'")


def register(tuner: type, mapping: Any) -> None:
    """Add `SpielConfig` and its tuner to PEFT's mappings.

    Args:
        tuner: the class of the tuner.
        mapping: the module `peft.mapping`.

    Raises:
        UserError: the mappings are not where they are known to be.
    """
    missing = [name for name in _MAPPINGS if not isinstance(getattr(mapping, name, None), dict)]
    if missing:
        version = importlib.metadata.version("peft")
        raise UserError(
            f"peft: got {version}, whose peft.mapping has no {missing[0]}, expected the one of peft 0.21. Fix: install "
            "the version in constraints.txt, and report it"
        )
    for name, value in zip(_MAPPINGS, (SpielConfig, tuner, PREFIX), strict=True):
        getattr(mapping, name)[SpielType.SPIEL] = value
