"""The objective of a run, made from its options, data and model."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

from scale_sft.data.packing import refuse_leaks
from scale_sft.data.preference_batches import PreferenceBatches
from scale_sft.data.preferences import Preferences
from scale_sft.distributed.cluster import Cluster
from scale_sft.model.empty import text_config
from scale_sft.model.router_loss import router_loss_of
from scale_sft.model.sparse_model import SparseModel
from scale_sft.objective.layouts import layout_of
from scale_sft.objective.preference import Cut, PreferenceObjective
from scale_sft.objective.reference import Reference, ReferenceWeights
from scale_sft.objective.tokens import TokenObjective

from .inputs import Inputs, flat_rows


def objective_of(inputs: Inputs, cluster: Cluster, sparse: SparseModel) -> TokenObjective | PreferenceObjective:
    """Make the objective; with packing, prove on the loaded model that examples in a row do not see each other.

    Raises:
        UserError: they do, or the base is not that of the reference adapter.
    """
    config, device = inputs.config, cluster.device
    examples = inputs.train
    if not isinstance(examples, Preferences):
        if inputs.row_tokens:
            refuse_leaks(sparse.model, text_config(inputs.model_config).vocab_size, device, flat=flat_rows(config))
        balance = router_loss_of(sparse.model, config.objective.router_aux_loss)
        return TokenObjective(examples, partial(inputs.micro_batches, cluster=cluster), balance)
    layout, note = layout_of(
        sparse.model,
        row_tokens=inputs.row_tokens,
        attention=inputs.attention.name,
        pairs=config.objective.pairs,
        device=device,
    )
    if inputs.row_tokens and not layout.shared:
        refuse_leaks(sparse.model, text_config(inputs.model_config).vocab_size, device, flat=layout.flat)
    pad_id = inputs.tokenizer.pad_token_id
    cached = config.objective.reference_kind == "precomputed"
    reference = Reference(
        weights=ReferenceWeights(sparse, inputs.reference.entries(sparse) if inputs.reference else None),
        cluster=cluster,
        pad_id=pad_id,
        cache=inputs.cache if cached else None,
        facts=(str(inputs.dtype), inputs.attention.name, settings_hash(inputs.model_config)),
    )
    return PreferenceObjective(
        settings=config.objective,
        batches=PreferenceBatches(examples, layout, pad_id, device),
        held_out=inputs.eval if isinstance(inputs.eval, Preferences) else None,
        reference=reference,
        cluster=cluster,
        cut=Cut(config.run.micro_batch_size, config.sparse.proposal_batch_size),
        notes=list(filter(None, (note, _start_left_out(inputs)))),
    )


def _start_left_out(inputs: Inputs) -> str | None:
    """Say that the reference is the bare base although the run starts from an adapter; None: it is not, or does."""
    given = inputs.config.objective
    if not inputs.start or given.reference_adapter or given.reference_kind == "none":
        return None
    start = inputs.config.sparse.start_from
    return (
        f"reference: the base alone, without the adapter that the run starts from. To keep that: --reference_adapter "
        f"{start}"
    )


def settings_hash(model_config: Any) -> str:
    """Hash the settings of a model, wherever it was loaded from: 64 hex digits.

    The same weights compute something else with another rope scaling, for example.
    """
    settings = {name: value for name, value in model_config.to_dict().items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
