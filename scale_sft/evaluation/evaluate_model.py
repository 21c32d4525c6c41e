"""Evaluation of a finished model: base, base + adapter, or merged; on one process, several, or sharded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale_sft.adapters.apply import require_base, require_fit
from scale_sft.adapters.format import Adapter
from scale_sft.config.options import DataConfig, ModelConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.chat import use_template
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.files import write_json
from scale_sft.model.loading import load_base, load_model_config, load_tokenizer, resolve_dtype
from scale_sft.model.resident import effective_values, read_entries, write_entries

from .answers import exact_match, greedy_answers
from .held_out import held_out_loss


def model_section(model: ModelConfig, adapter: Path | None, *, base_given: bool) -> ModelConfig:
    """The options of the model, those that an adapter knows filled in: its base, revision and dtype."""
    if adapter is None:
        return model
    info = Adapter.load(adapter).info
    model = model if base_given else replace(model, base=info["base"], revision=info.get("revision"))
    return replace(model, dtype=info["dtype"] if model.dtype == "auto" else model.dtype)


def evaluate_model(
    model_config: ModelConfig,
    data: DataConfig,
    adapter_folder: Path | None,
    *,
    tasks: str | None,
    limit: int | None,
    batch_size: int,
    output: Path | None,
) -> str | None:
    """Evaluate on held-out data and tasks; the results as JSON text on the main rank, None on others.

    Args:
        tasks: of lm-evaluation-harness; see `evaluate_tasks`.
        limit: examples of each task; None for all.

    Raises:
        UserError: whatever is wrong with model, adapter, data or tasks.
    """
    from scale_sft.model.loading import max_length

    from .harness import require_harness, run_tasks

    if tasks:
        require_harness()
    loaded = load_model_config(model_config)
    adapter = Adapter.load(adapter_folder) if adapter_folder else None
    if model_config.quantization != "none":
        raise UserError(
            "eval: quantization is not supported here; merge and quantise with `scale-sft merge --quantize`"
        )
    if adapter and adapter.is_quantized:
        raise UserError(
            f"eval: {adapter_folder} was trained on a base in {adapter.info['quantization']}; merge it first (scale-sft "
            "merge ADAPTER --output DIR, in bfloat16) and evaluate the result (scale-sft eval --base DIR)"
        )
    tokenizer = use_template(load_tokenizer(model_config), data.chat_template)
    if adapter and data.chat_template is None and adapter.info.get("chat_template"):
        tokenizer.chat_template = adapter.info["chat_template"]
    data = replace(data, max_length=max_length(data.max_length, loaded))
    examples = data.eval_data and load_examples(data.eval_data, "eval", tokenizer, data, data.max_eval_examples)
    sharded = model_config.base_placement == "shard"
    dtype = resolve_dtype(model_config, loaded)
    cluster = Cluster.start(sharded=sharded, dtype=dtype, ds_config=model_config.ds_config)
    try:
        model = cluster.prepare(load_base(model_config, loaded, cluster.load_device)).eval()
        if adapter:
            apply_parts(model, adapter, cluster)
        result: dict[str, Any] = {"base": model_config.base, "adapter": adapter_folder and str(adapter_folder)}
        if examples:
            result["held_out"] = _held_out(model, tokenizer, examples, data, cluster, batch_size)
        if tasks:
            result["tasks"] = run_tasks(model, tokenizer, tasks, batch_size=batch_size, limit=limit)
        if cluster.is_main and output:
            write_json(output, result)
        return json.dumps(result, indent=2, ensure_ascii=False) if cluster.is_main else None
    finally:
        cluster.close()


def _held_out(
    model: nn.Module, tokenizer: Any, examples: Any, data: DataConfig, cluster: Cluster, batch_size: int
) -> dict[str, Any]:
    figures = held_out_loss(model, examples, cluster, batch_size, tokenizer.pad_token_id)
    result: dict[str, Any] = {
        "data": examples.source,
        "examples": len(examples),
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "loss": figures.loss,
        "perplexity": figures.perplexity,
        "target_tokens": figures.target_tokens,
    }
    wanted = max(data.exact_match_examples, data.generation_samples)
    if not wanted:
        return result
    answers = greedy_answers(
        model,
        tokenizer,
        examples,
        cluster,
        count=wanted,
        batch_size=batch_size,
        max_new_tokens=data.max_new_tokens,
    )
    if data.exact_match_examples:
        matching = answers[: data.exact_match_examples]
        result |= {"exact_match": exact_match(matching, data.answer_pattern), "exact_match_examples": len(matching)}
    result["samples"] = [asdict(answer) for answer in answers[: data.generation_samples]]
    return result


@torch.no_grad()
def apply_parts(model: nn.Module, adapter: Adapter, cluster: Cluster) -> None:
    """Write an adapter's effective values into the parts of the weights that this rank holds, after checking them all.

    Raises:
        UserError: a weight is missing or of another size, or the base is not the adapter's.
    """
    weights = require_fit(dict(model.named_parameters()), adapter)
    parts = {name: cluster.part_of(weights[name]) for name in adapter.shapes}
    require_base(cluster.fingerprints(parts), adapter)
    for name, part in parts.items():
        where = part.slice_of(adapter.indices[name])
        entries = part.entries()
        places = (adapter.indices[name][where].long() - part.start).to(entries.device)
        deltas = adapter.deltas[name][where].to(entries.device)
        write_entries(entries, places, effective_values(read_entries(entries, places), deltas))
    cluster.written()
