"""The input embedding and the output layer of a model as targets: which they are, whether they share a weight, taps.

Shapes: V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.spiel.embedding_taps import EmbeddingTap
from scale_sft.spiel.taps import Materialize, Record, WeightTap, attach


@dataclass(frozen=True)
class Embeddings:
    """The modules of a model at both ends of its vocabulary, with their paths; those that it has."""

    input: str | None = None
    output: str | None = None
    embedding: nn.Embedding | None = None
    layer: nn.Module | None = None

    @property
    def tied(self) -> bool:
        """True if both have one weight."""
        return None not in (self.input, self.output) and self._weight(self.embedding) is self._weight(self.layer)

    @staticmethod
    def _weight(module: Any) -> Any:
        return getattr(module, "weight", None)

    def chosen_by(self, option: str) -> list[str]:
        """List the paths that option train_embeddings adds to the targets.

        Raises:
            UserError: the model has no such layer.
        """
        wanted = {"input": ("input",), "output": ("output",), "both": ("input", "output")}.get(option, ())
        missing = next((end for end in wanted if getattr(self, end) is None), None)
        if missing:
            raise UserError(
                f"train_embeddings: got {option}, but this model names no {missing} embedding with a weight of its "
                "own. Fix: leave train_embeddings out, or name layers by target_modules"
            )
        return [getattr(self, end) for end in wanted]


def embeddings_of(model: Any) -> Embeddings:
    """Find a model's input embedding, which must be an `nn.Embedding`, and its output layer."""
    modules = {id(module): path for path, module in model.named_modules()}
    embedding, layer = (_named(model, f"get_{end}_embeddings") for end in ("input", "output"))
    embedding = embedding if isinstance(embedding, nn.Embedding) else None
    layer = layer if isinstance(getattr(layer, "weight", None), nn.Parameter) else None
    return Embeddings(modules.get(id(embedding)), modules.get(id(layer)), embedding, layer)


def _named(model: Any, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):  # not a model of transformers, or one without
        return None


def attach_embedding_taps(
    module: nn.Embedding,
    output: nn.Module | None,
    name: str,
    record: Record,
    *,
    materialize: Materialize,
    look_up: Callable[[Tensor], Tensor] | None = None,
    effective_weight: Callable[[], Tensor] | None = None,
) -> None:
    """Route an embedding through a tap, and the output layer that shares its weight, if any.

    A backward pass reaches the output layer first, so the embedding's part of their gradient is the last.

    Args:
        module: the input embedding.
        output: of the same weight [V, H].
        name: of the weight.
        record: receives both parts of its gradient.
        materialize: see `Materialize`.
        look_up: see `EmbeddingTap`.
        effective_weight: see `WeightTap`.
    """
    attach(EmbeddingTap(module, name, record, look_up=look_up))
    if output is not None:
        first = partial(record, more=True)
        attach(WeightTap(output, name, first, materialize=materialize, effective_weight=effective_weight))
