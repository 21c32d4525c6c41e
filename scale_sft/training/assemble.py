"""From inputs to a session: load the base and make it a sparse model over the ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from scale_sft.adapters.base_files import require_mergeable
from scale_sft.distributed.cluster import Cluster
from scale_sft.model.compiled_blocks import compile_blocks, decoder_blocks
from scale_sft.model.empty import empty_model
from scale_sft.model.loading import base_location, load_base
from scale_sft.model.memory import PeakMemory
from scale_sft.model.quantization import staging_device
from scale_sft.model.sparse_model import SparseModel
from scale_sft.model.sparse_settings import SparseSettings
from scale_sft.model.targets import targets_of

from .inputs import Inputs
from .objectives import objective_of
from .session import Session
from .starting import recorded_counts


def assemble(inputs: Inputs, cluster: Cluster) -> Session:
    """Load the base, choose its targets, set up the method, and put in the adapter that the run starts from.

    Raises:
        UserError: the base does not load or is not that adapter's, targets match nothing, or ranks loaded different
            weights.
    """
    config = inputs.config
    cluster.check_identical(inputs.digests, "their inputs")
    quantization, device = inputs.quantization, cluster.load_device
    if quantization:
        device = device or staging_device(cluster.device, inputs.placement.base_bytes or 0)
    with PeakMemory(cluster.device) as loading, cluster.loading_whole() if quantization else nullcontext():
        chosen = replace(config.model, attention=inputs.attention.asked)
        model = load_base(chosen, inputs.model_config, device, quantization)
    if quantization is None:
        cluster.on_main(lambda: _check_hub_base(inputs))
    settings = SparseSettings(
        sparse=config.sparse,
        optimizer=config.optimizer,
        total_steps=inputs.steps,
        dtype=inputs.dtype,
        quantization=quantization,
        seed=config.run.seed,
        kernels=config.run.kernels,
        start=inputs.start.counts if inputs.start else None,
        counts=cluster.on_main(lambda: recorded_counts(config)),
    )
    sparse = SparseModel(model, settings, cluster)
    cluster.check_identical(lambda: {"base": sparse.base_hash}, "the base model")
    if inputs.start:
        inputs.start.put_into(sparse)
    objective = objective_of(inputs, cluster, sparse)
    if config.model.compile == "blocks":
        _compile(sparse)
    return Session(
        inputs=inputs,
        cluster=cluster,
        sparse=sparse,
        objective=objective,
        optimizer=sparse.optimizer(),
        load_peak_bytes=loading.added,
        loaded_on=device,
    )


def _check_hub_base(inputs: Inputs) -> None:
    """Prove on a base of the hub what `read_inputs` proves on a local folder: that the result can be merged."""
    config = inputs.config
    if Path(base_location(config.model.base)).is_dir():
        return
    model = empty_model(inputs.model_config, trust_remote_code=config.model.trust_remote_code)
    targets = targets_of(model, config.sparse)
    require_mergeable(config.model, model, {target.name: target.shape for target in targets}, loaded=True)


def _compile(sparse: SparseModel) -> None:
    """Compile the blocks. With several ranks they run as they are while entries or candidates are chosen.

    Ranks meet in such backward passes, once per weight, and a graph may choose an order of its own.
    """
    meeting = lambda: sparse.group.size > 1 and (sparse.tuning.recorder.proposing or sparse.choosing is not None)
    compile_blocks(decoder_blocks(sparse.model, sparse.shapes), as_they_are=meeting)
