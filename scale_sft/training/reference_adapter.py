"""The adapter of option reference_adapter: read, and checked against the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_sft.adapters.format import Adapter
from scale_sft.adapters.start import Start, naming_the_option
from scale_sft.config.options import Config
from scale_sft.errors import UserError
from scale_sft.model.quantization import Quantization
from scale_sft.model.sparse_model import SparseModel

REFERENCE_DIGEST = "reference_adapter (digest of its indices and deltas)"
"""Key of a checkpoint's identity."""


@dataclass(frozen=True)
class ReferenceAdapter:
    """An adapter that is part of the reference; its tensors stay in its folder."""

    folder: str
    digest: str  # of its indices and deltas: 64 hex digits
    info: Mapping[str, Any]

    def entries(self, sparse: SparseModel) -> dict[str, tuple[Tensor, Tensor]]:
        """Read indices [K] and deltas [K] by weight.

        Raises:
            UserError: the base is not the adapter's.
        """
        if sparse.base_hash != self.info["base_hash"]:
            raise UserError(
                f"reference_adapter: got a base of hash {sparse.base_hash[:16]}..., expected "
                f"{self.info['base_hash'][:16]}..., that of '{self.info['base']}', which {self.folder} was trained on. "
                "Fix: give that base, or the adapter of this one"
            )
        with naming_the_option("reference_adapter"), Adapter.open(self.folder) as adapter:
            return {name: (adapter.indices[name], adapter.deltas[name]) for name in adapter.shapes}


def reference_of(
    config: Config, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, quantization: Quantization | None
) -> ReferenceAdapter | None:
    """Read the adapter of option reference_adapter; None: the reference is the base.

    Raises:
        UserError: it is missing or damaged, or its weights, dtype or quantisation are not the run's.
    """
    folder = config.objective.reference_adapter
    if folder is None:
        return None
    with naming_the_option("reference_adapter", "start_from"):
        found = Start.read(folder)
        found.refuse_other_weights(shapes, dtype, quantization)
    return ReferenceAdapter(folder, found.digest, found.info or {})
