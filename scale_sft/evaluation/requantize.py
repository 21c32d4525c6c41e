"""Quantise a merged model to 4 or 8 bits again and measure the cost: small deltas vanish in the rounding.

Only on request: the step between two values of 4 bits is far larger than most deltas.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scale_sft.adapters.base_files import INDEX_FILE, BaseFiles
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge_packed import is_transposed, merge_quantized, unquantized_shapes
from scale_sft.adapters.model_card import write_card
from scale_sft.adapters.safetensors_writer import TensorReader, TensorWriter
from scale_sft.config.loading import load
from scale_sft.config.options import ModelConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.chat import use_template
from scale_sft.data.examples import Examples
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.files import new_folder, write_atomically, write_text
from scale_sft.model.loading import load_base, load_model_config, load_tokenizer, max_length
from scale_sft.model.packed_weights import PackedWeight, packed_weights
from scale_sft.model.quantization import resolve_quantization
from scale_sft.model.transient import TransientDeltas, attach_transient_taps
from scale_sft.spiel.deltas import DeltaStore

from .held_out import held_out_loss

SMALL_FILES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Loss:
    """The cost of writing a merged model in 4 or 8 bits, in deltas and held-out loss."""

    kind: str
    active: int  # entries where the merged model differs from the base
    undone: int  # of those, entries that have their base value again
    delta_error: float  # norm of what became of the deltas minus the deltas, over the norm of the deltas
    weight_error: float  # norm of the change of all target weights, over their norm
    held_out: str  # held-out losses, or why there are none

    def __str__(self) -> str:
        share = self.undone / max(1, self.active)
        return (
            f"loss by {self.kind}: {self.undone:,} of {self.active:,} deltas vanish ({share:.1%}); relative error: "
            f"{self.delta_error:.1%} of the deltas, {self.weight_error:.2%} of the target weights\n"
            f"held-out loss: {self.held_out}"
        )


def merge_into_few_bits(
    adapter_folder: str | Path, output: str | Path, kind: str, base: str | None = None, *, licence: str | None = None
) -> str:
    """Merge, quantise the result (double quantised) as a folder that transformers loads, and measure the loss.

    Args:
        kind: nf4, fp4 or int8.
        licence: for the model card; see `merge`.

    Returns:
        A text that says what was written and what was lost.

    Raises:
        UserError: see `merge_quantized`; or the adapter's base was not quantised.
    """
    adapter, output = Adapter.load(adapter_folder), Path(output).expanduser()
    if not adapter.is_quantized:
        raise UserError(
            "quantize: this adapter was trained on an unquantised base; merge it without --quantize, and quantise the "
            "merged model when it is loaded"
        )
    with new_folder(output, "merge") as work:
        merged = work / ".merged"
        merged.mkdir()
        kept = merge_quantized(adapter, merged, base)
        if adapter.info.get("chat_template"):
            write_text(merged / "chat_template.jinja", adapter.info["chat_template"])
        model = _load(merged, kind)
        model.save_pretrained(work)  # before the scales are taken out of the layers
        _keep_stored_bytes(work, merged)
        for path in merged.iterdir():
            if path.suffix in SMALL_FILES and path.name != INDEX_FILE and not (work / path.name).exists():
                shutil.copyfile(path, work / path.name)
        write_card(adapter_folder, work, form="merged", name=output.resolve().name, licence=licence)
        packed = packed_weights(model, torch.bfloat16, next(model.parameters()).device)
        figures = _measure(merged, packed, adapter, kept)
        attach_transient_taps(TransientDeltas(DeltaStore({}, {}), packed), (), lambda *_, more=False: None)
        run = Path(adapter_folder).expanduser().resolve().parent
        losses = _held_out_losses(run / "config.yaml", merged, model, kind)
        shutil.rmtree(merged)
    return f"merged model in {kind}: {output}\n{Loss(kind, *figures, losses)}"


def _keep_stored_bytes(work: Path, merged: Path) -> None:
    """Give tensors that were not quantised the bytes that they have in `merged`: loading has rounded some."""
    with BaseFiles(merged) as files:
        for path in work.glob("*.safetensors"):
            with TensorReader(path) as saved:
                stored = {name: files.find(name) for name in saved.names if saved.dtype(name).is_floating_point}
                rounded = {
                    name: found
                    for name, found in stored.items()
                    if found is not None and files.dtype(found) is not saved.dtype(name)
                }
                if rounded:
                    write_atomically(path, partial(_replace_tensors, saved, files, rounded))


def _replace_tensors(saved: TensorReader, files: BaseFiles, names: Mapping[str, str], target: Path) -> None:
    dtype_of = lambda name: files.dtype(names[name]) if name in names else saved.dtype(name)
    specs = {name: (dtype_of(name), saved.shape(name)) for name in saved.names}
    with TensorWriter(target, specs, saved.metadata) as writer:
        for name in specs:
            writer.write(name, files.tensor(names[name]) if name in names else saved.tensor(name))


def _load(folder: Path, kind: str = "none") -> Any:
    """Load a merged model in bfloat16, quantised where `kind` says so."""
    config = ModelConfig(base=str(folder), dtype="bfloat16", quantization=kind)
    model_config = load_model_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_base(config, model_config, device, resolve_quantization(config, model_config))


def _measure(
    merged: Path, packed: Mapping[str, PackedWeight], adapter: Adapter, kept: Mapping[str, Tensor]
) -> tuple[int, int, float, float]:
    """Count active and undone entries and compute the errors of the deltas and of the weights: see `Loss`."""
    reference = unquantized_shapes(ModelConfig(base=str(merged)))
    active = undone = 0
    delta_error = delta_norm = weight_error = weight_norm = 0.0
    for file in sorted(merged.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in sorted(set(handle.keys()) & set(adapter.shapes) & set(packed)):
                weight = packed[name].dequantize(packed[name].module.get_parameter("weight").data).float().cpu()
                wanted = handle.get_tensor(name).float()
                wanted = wanted.t() if is_transposed(reference, name) else wanted
                weight_error += float((weight - wanted).square().sum())
                weight_norm += float(wanted.square().sum())
                indices, base = adapter.indices[name], kept[name].float()
                delta = wanted.reshape(-1).gather(0, indices) - base
                became = weight.view(-1).gather(0, indices) - base
                delta_error += float((became - delta).square().sum())
                delta_norm += float(delta.square().sum())
                active += int((delta != 0).sum())
                undone += int(((delta != 0) & (became == 0)).sum())
    relative = lambda error, norm: (error / norm) ** 0.5 if norm else 0.0
    return active, undone, relative(delta_error, delta_norm), relative(weight_error, weight_norm)


def _held_out_losses(recipe: Path, merged: Path, quantized: nn.Module, kind: str) -> str:
    """Evaluate both models on the held-out data of the run, if it is still there and the models fit."""
    if not recipe.is_file():
        return f"not measured: the run's {recipe.name} is not next to the adapter"
    try:
        examples, size, pad = _held_out_data(recipe, merged)
    except UserError as error:
        return f"not measured: {error}"
    cluster = Cluster.start(sharded=False, dtype=torch.bfloat16)
    try:
        few = held_out_loss(quantized, examples, cluster, size, pad).loss
        whole = held_out_loss(_load(merged), examples, cluster, size, pad).loss
    except torch.OutOfMemoryError:
        return "not measured: the merged model does not fit this device"
    finally:
        cluster.close()
    return f"{whole:.4f} merged in bfloat16, {few:.4f} in {kind}"


def _held_out_data(recipe: Path, merged: Path) -> tuple[Examples, int, int]:
    """Load the held-out examples of a run; returns them, its batch size for evaluation and the padding token.

    Raises:
        UserError: the run has none, or they are gone.
    """
    config, model = load(recipe, {}), ModelConfig(base=str(merged))
    eval_data = config.data.eval_data
    if not eval_data:
        raise UserError("the run has no eval_data")
    tokenizer = use_template(load_tokenizer(model), config.data.chat_template)
    data = replace(config.data, max_length=max_length(config.data.max_length, load_model_config(model)))
    examples = load_examples(eval_data, "eval", tokenizer, data, data.max_eval_examples)
    return examples, config.run.eval_batch_size, tokenizer.pad_token_id
