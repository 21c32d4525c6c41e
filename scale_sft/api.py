"""Attach sparse deltas to a loaded model: the Python API."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from scale_sft.adapters.live import carries_adapter
from scale_sft.adapters.start import Start
from scale_sft.adapters.trained import trained_adapter
from scale_sft.config.loading import load_sections, unknown
from scale_sft.config.options import ModelConfig, OptimizerConfig, SparseConfig
from scale_sft.config.rules import broken_selection
from scale_sft.distributed.existing import existing_ranks
from scale_sft.errors import UserError, first_line
from scale_sft.model.exposure import carries_deltas
from scale_sft.model.group import OneProcess
from scale_sft.model.packed_weights import is_quantized_layer
from scale_sft.model.quantization import Quantization, resolve_quantization
from scale_sft.model.sparse_model import Save, SparseModel
from scale_sft.model.sparse_settings import SparseSettings
from scale_sft.model.targets import targets_of, transposed_names
from scale_sft.model.visibility import visible_fraction

BUDGETS = ("density", "tunable_weights", "rank_equivalent")
KERNELS = ("off", "cpu", "auto")
DEFAULT_DENSITY = 0.01


def attach(
    model: nn.Module,
    *,
    total_steps: int = 1000,
    seed: int = 0,
    kernels: str = "auto",
    base: str | None = None,
    **options: Any,
) -> SparseModel:
    """Freeze a loaded transformers model and give its target weights sparse deltas to train.

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> sparse = scale_sft.attach(model, method="ag", density=0.01, total_steps=1000)
        >>> optimizer = sparse.optimizer(lr=1e-2)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        >>> sparse.save("adapter")
        >>> sparse.detach()

    Move the model to its device first. If torch.distributed has several processes, each attaches its own whole copy,
    and steps average gradients over them; DistributedDataParallel is not needed, and does no harm. It may be
    initialised later, as the Trainer of transformers does, but before the first backward pass. Dropout is switched off
    until detach.

    Args:
        model: a causal language model, in float32, bfloat16 or float16, or in 4 or 8 bits of bitsandbytes.
        total_steps: optimizer steps of the whole training; the fraction that is replaced falls to 0 over them.
        seed: of the initial indices.
        kernels: `auto`, `cpu` or `off`: see option kernels of `scale-sft train`.
        base: recorded as the adapter's base; default: the path or hub id that the model was loaded from.
        options: every option of sections sparse and optimizer, by name: method, density (default: 0.01),
            target_modules, update_interval_steps, betas, max_grad_norm, ...; with start_from, the folder of an
            adapter, its deltas are in the model at once, and its entries per weight are the budget.

    Raises:
        UserError: an option is wrong, or the model cannot carry deltas; the model is unchanged.
    """
    sparse, optimizer = _sections(options)
    _check_arguments(total_steps, seed, kernels)
    targets = _usable_targets(model, sparse)
    name = base or getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    quantization = _quantization(model, name)
    weight = targets[0].weight
    device = weight.device
    dtype = _compute_dtype(model) if quantization else weight.dtype
    start = Start.read(sparse.start_from, sparse.delta_dtype) if sparse.start_from else None
    if start:
        shapes, transposed = {target.name: target.shape for target in targets}, transposed_names(targets)
        start.refuse_misfit(sparse, shapes, dtype, quantization, transposed)
    settings = SparseSettings(
        sparse=sparse,
        optimizer=optimizer,
        total_steps=total_steps,
        dtype=dtype,
        quantization=quantization,
        seed=seed,
        kernels=kernels,
        start=start.counts if start else None,
    )
    ranks = existing_ranks(device)
    made = SparseModel(model, settings, ranks or OneProcess(device), _writer(name), partial(existing_ranks, device))
    try:
        if start:
            start.put_into(made)
        if ranks:
            ranks.check_identical(lambda: {"base": made.base_hash}, "the base model")
            ranks.check_identical(made.tuning.digests, "the initial deltas")
        made.expose()
    except BaseException:
        made.detach()
        raise
    return made


def _sections(options: dict[str, Any]) -> tuple[SparseConfig, OptimizerConfig]:
    """Sort options into their two sections, with exactly one budget: given, the adapter's own, or a default density."""
    known = {field.name for kind in (SparseConfig, OptimizerConfig) for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise UserError(f"attach: {unknown(f'option {name!r}', name, sorted(known))}")
    if options.get("proposal_batch_size") is not None:
        raise UserError(
            "proposal_batch_size: got a number, expected none, as attach does not split batches: the first backward "
            "pass of a step proposes. Fix: leave it out"
        )
    given = [name for name in BUDGETS if options.get(name) is not None]
    if len(given) > 1:
        raise UserError(f"budget: got {' and '.join(given)}, expected one of them. Fix: leave out the others")
    decided = given or options.get("start_from") is not None
    sections = load_sections(None, options if decided else {**options, "density": DEFAULT_DENSITY})
    sparse = sections["sparse"]
    if sparse.estimation_steps > sparse.update_interval_steps:
        raise UserError(
            f"estimation_steps: got {sparse.estimation_steps}, expected at most update_interval_steps "
            f"({sparse.update_interval_steps}). Fix: lower it"
        )
    if mistakes := broken_selection(sparse):
        raise UserError(mistakes[0])
    return sparse, sections["optimizer"]


def _check_arguments(total_steps: int, seed: int, kernels: str) -> None:
    if type(total_steps) is not int or total_steps < 1:
        raise UserError(f"total_steps: got {total_steps!r}, expected a whole number of at least 1")
    if type(seed) is not int or seed < 0:
        raise UserError(f"seed: got {seed!r}, expected a whole number of at least 0")
    if kernels not in KERNELS:
        raise UserError(f"kernels: {unknown(repr(kernels), str(kernels), KERNELS)}")


def _usable_targets(model: nn.Module, sparse: SparseConfig) -> list:
    """Find the layers to train and check that the model can be attached, without changing it."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"attach: got {model!r}, expected a model in memory. Fix: AutoModelForCausalLM.from_pretrained(...)"
        )
    if carries_deltas(model):
        raise UserError(
            "attach: got a model that carries deltas already. Fix: use its SparseModel, or detach() it first"
        )
    if carries_adapter(model):
        raise UserError("attach: got a model that carries a live adapter. Fix: undo() it first, or use start_from")
    targets = targets_of(model, sparse)
    away = next((target.name for target in targets if target.weight.is_meta), None)
    if away:
        raise UserError(
            f"attach: weight '{away}' is on the meta device (offloaded or not loaded), expected it in memory. Fix: "
            "load the model without offloading"
        )
    where = {(target.weight.device, target.weight.dtype) for target in targets}
    devices = {device for device, _ in where}
    if len(devices) > 1:
        raise UserError(
            f"attach: got a model spread over {', '.join(sorted(map(str, devices)))}, expected one device. Fix: "
            "load it with device_map {'': device}"
        )
    plain = {t.weight.dtype for t in targets if not is_quantized_layer(t.module)}
    odd = sorted(str(dtype) for dtype in plain if dtype not in (torch.float32, torch.bfloat16, torch.float16))
    if odd or (len(plain) > 1 and len(where) == len(plain)):
        raise UserError(
            f"attach: got target weights in {', '.join(sorted(map(str, plain)))}, expected one of float32, bfloat16 "
            "and float16. Fix: load the model in one of them; of quantised models, bitsandbytes' can be attached"
        )
    return targets


def _quantization(model: nn.Module, base: str) -> Quantization | None:
    """Find the model's bitsandbytes format; None if it is not quantised.

    Raises:
        UserError: the model is quantised by something else.
    """
    config = getattr(model, "config", None)
    found = resolve_quantization(ModelConfig(base=base or "this model"), config)
    if found is None and any(map(is_quantized_layer, model.modules())):
        raise UserError(
            "attach: got bitsandbytes layers in a model whose config does not mention them, expected a model quantised "
            "by transformers. Fix: load it with a BitsAndBytesConfig"
        )
    if found is None or _stored_quantized(base):
        return found
    return dataclasses.replace(found, on_disk=False)


def _compute_dtype(model: Any) -> torch.dtype:
    """Return the compute dtype of a quantised model: that of its embeddings, which are not quantised."""
    return model.get_input_embeddings().weight.dtype


def _stored_quantized(base: str) -> bool:
    """Return True if the base is stored quantised, rather than quantised while it was loaded."""
    file = Path(base) / "config.json"
    if base and file.is_file():
        return "quantization_config" in json.loads(file.read_text(encoding="utf-8"))
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(base), "quantization_config", None) is not None
    except (OSError, ValueError):  # cannot be looked up: assume that it was quantised while it was loaded
        return False


def _writer(base: str) -> Save:
    """Make a function that writes a sparse model's adapter folder."""

    def save(sparse: SparseModel, folder: Path) -> None:
        adapter = trained_adapter(sparse, base, None)
        adapter.info["visible_in_bfloat16"] = round(visible_fraction(sparse), 4)

        def write() -> None:
            try:
                adapter.save(folder)
            except (OSError, SafetensorError) as error:
                raise UserError(f"save: '{folder}' cannot be written: {first_line(error)}") from None

        sparse.group.on_main(write)

    return save
