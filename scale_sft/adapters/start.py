"""Start training from a finished adapter: read it, check that it fits the run, put it into the model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from scale_sft.config.options import ModelConfig, SparseConfig
from scale_sft.errors import UserError
from scale_sft.model.experts import layer_kind
from scale_sft.model.quantization import Quantization
from scale_sft.model.sparse_model import SparseModel
from scale_sft.model.targets import budget_of
from scale_sft.model.tilings import tilings_of
from scale_sft.spiel.tiles import Tiling

from .format import Adapter

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Start:
    """The known facts of an adapter that training starts from; its tensors stay in its folder."""

    folder: str
    shapes: dict[str, tuple[int, int]]
    counts: dict[str, int]  # active entries K by weight
    digest: str  # of its indices and deltas: 64 hex digits
    info: dict[str, Any] | None  # the rest of adapter_config.json; None: the folder is gone, a checkpoint replaces it

    @classmethod
    def read(cls, folder: str, delta_dtype: str = "float32") -> Start:
        """Read an adapter folder, one weight at a time, and check all of it.

        Args:
            folder: of the adapter.
            delta_dtype: how training keeps deltas.

        Raises:
            UserError: it is missing or damaged, a weight has no entry, or a delta would be rounded.
        """
        sha, counts = hashlib.sha256(), {}
        with naming_the_option("start_from"), Adapter.open(folder) as adapter:
            for name in adapter.shapes:
                indices, deltas = adapter.indices[name], adapter.deltas[name]
                counts[name] = indices.numel()
                if not counts[name]:
                    raise UserError(
                        f"start_from: weight '{name}' has 0 entries in {folder}, expected at least 1. Fix: choose an "
                        "adapter with entries in each of its weights"
                    )
                if not torch.equal(deltas.to(getattr(torch, delta_dtype)).float(), deltas.float()):
                    raise UserError(
                        f"start_from: got deltas in {_plain(deltas.dtype)}, expected such as {delta_dtype} can hold. "
                        f"Fix: --delta_dtype {_plain(deltas.dtype)}"
                    )
                sha.update(f"{name} {indices.dtype} {deltas.dtype} {counts[name]}\n".encode())
                for tensor in (indices, deltas):
                    sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return cls(folder, adapter.shapes, counts, sha.hexdigest(), adapter.info)

    def refuse_misfit(
        self,
        sparse: SparseConfig,
        shapes: Shapes,
        dtype: torch.dtype,
        quantization: Quantization | None,
        transposed: Collection[str] = (),
    ) -> None:
        """Check all that can be checked without the base's weights.

        Args:
            sparse: the options; a budget is one of them, or none.
            shapes: (O, I) of each target weight.
            dtype: of the computation.
            quantization: how the base is kept.
            transposed: see `tilings_of`.

        Raises:
            UserError: targets, shapes, budget, dtype or quantisation are not the adapter's; or its entries are not
                whole columns, rows or blocks where these are to be trained.
        """
        self.refuse_other_weights(shapes, dtype, quantization)
        self._refuse_budget(sparse, shapes, transposed)
        tilings = tilings_of(sparse, shapes, transposed)
        if tilings and self.info:
            with Adapter.open(self.folder) as adapter:
                for name, tiling in tilings.items():
                    self._refuse_parts(sparse, name, tiling, adapter.indices[name])

    def refuse_other_weights(self, shapes: Shapes, dtype: torch.dtype, quantization: Quantization | None) -> None:
        """Check all of `refuse_misfit` but the budget.

        Raises:
            UserError: targets, shapes, dtype or quantisation are not the adapter's.
        """
        base = f"; its base is '{self.info['base']}'" if self.info else ""
        self._refuse_targets(shapes, base)
        odd = next((name for name in shapes if shapes[name] != self.shapes[name]), None)
        if odd:
            raise UserError(
                f"start_from: got '{odd}' of shape {self.shapes[odd]} in {self.folder}, expected {shapes[odd]} as in "
                f"the base of the run{base}. Fix: give the adapter's base"
            )
        if self.info:
            self._refuse_numbers(self.info, dtype, quantization)

    def _refuse_targets(self, shapes: Shapes, base: str) -> None:
        """Raise UserError unless the weights are the adapter's; offers the target_modules that would be."""
        if shapes.keys() == self.shapes.keys():
            return
        only = [name for name in self.shapes if name not in shapes] or [n for n in shapes if n not in self.shapes]
        where = "the adapter alone" if only[0] in self.shapes else "the run alone"
        kinds = ",".join(dict.fromkeys(layer_kind(name) for name in self.shapes))
        raise UserError(
            f"start_from: {self.folder} has {len(self.shapes)} target weights, the run {len(shapes)} ('{only[0]}' is "
            f"in {where}){base}. Fix: train the adapter's weights of its base, such as --target_modules {kinds}"
        )

    def _refuse_parts(self, sparse: SparseConfig, name: str, tiling: Tiling, indices: torch.Tensor) -> None:
        try:
            tiling.chosen_in(indices)
        except ValueError:
            raise UserError(
                f"start_from: got entries of '{name}' in {self.folder} that are not whole {sparse.trains_whole}s, "
                f"expected them for granularity {sparse.trains_whole}. Fix: --method static --granularity entry trains "
                "any entries further"
            ) from None

    def _refuse_budget(self, sparse: SparseConfig, shapes: Shapes, transposed: Collection[str]) -> None:
        given = [name for name in ("density", "tunable_weights", "rank_equivalent") if getattr(sparse, name)]
        if not given:
            return
        counts = budget_of(sparse, dict(shapes), transposed)
        odd = next((name for name in shapes if counts[name] != self.counts[name]), None)
        if odd:
            raise UserError(
                f"start_from: {self.folder} has {sum(self.counts.values()):,} entries, {given[0]} "
                f"{getattr(sparse, given[0])} leads to {sum(counts.values()):,} (in '{odd}' {self.counts[odd]:,} and "
                f"{counts[odd]:,}), expected the same in each weight. Fix: leave {given[0]} out (--{given[0]} none "
                "where a recipe gives it): the budget is then the adapter's own"
            )

    def _refuse_numbers(self, info: Mapping[str, Any], dtype: torch.dtype, quantization: Quantization | None) -> None:
        kept = info.get("quantization", "none"), bool(info.get("double_quantization"))
        found = (quantization.kind, quantization.double) if quantization else ("none", False)
        if kept[0] != found[0]:
            raise UserError(
                f"start_from: got an adapter of a base in quantization {kept[0]}, expected {found[0]} as in this run. "
                f"Fix: --quantization {kept[0]}"
            )
        if kept[0] != "int8" and kept[1] != found[1]:
            raise UserError(
                f"start_from: got an adapter of a base with double_quantization {str(kept[1]).lower()}, expected "
                f"{str(found[1]).lower()} as in this run. Fix: --double_quantization {str(kept[1]).lower()}"
            )
        if info["dtype"] != _plain(dtype):
            choosable = info["dtype"] in ModelConfig.__dataclass_fields__["dtype"].metadata["choices"]
            fix = f"--dtype {info['dtype']}" if choosable else "train it further with scale_sft.attach"
            raise UserError(
                f"start_from: got an adapter of a base in {info['dtype']}, expected {_plain(dtype)} as in this run. "
                f"Fix: {fix}"
            )

    def put_into(self, sparse: SparseModel) -> None:
        """Make the adapter the initial state of a sparse model whose settings have its counts.

        Does nothing where the folder is gone: a checkpoint will be loaded.

        Raises:
            UserError: the base is not the adapter's.
        """
        if self.info is None:
            return
        if sparse.base_hash != self.info["base_hash"]:
            raise UserError(
                f"start_from: got a base whose target weights have the hash {sparse.base_hash[:16]}..., expected "
                f"{self.info['base_hash'][:16]}..., that of '{self.info['base']}', which {self.folder} was trained on. "
                "Fix: give that base"
            )
        with naming_the_option("start_from"), Adapter.open(self.folder) as adapter:
            names = sparse.tuning.store.names
            sparse.begin_with((name, adapter.indices[name], adapter.deltas[name]) for name in names)


@contextmanager
def naming_the_option(option: str, *others: str) -> Iterator[None]:
    """Let errors of the adapter's files, and those that name one of the `others`, name the option."""
    try:
        yield
    except UserError as error:
        for other in (*others, "adapter"):
            if str(error).startswith(f"{other}: "):
                raise UserError(f"{option}: {str(error).removeprefix(f'{other}: ')}") from None
        raise


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
