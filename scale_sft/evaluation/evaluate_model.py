"""Evaluate a finished model: a base, a base with an adapter, or a merged model; on one process, several, or sharded."""

from __future__ import annotations

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
from scale_sft.data.examples import Examples
from scale_sft.data.fit import refuse_misfit
from scale_sft.data.turn_ends import INFO_KEY, with_end
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.files import write_json
from scale_sft.model.held import parts_held
from scale_sft.model.loading import load_base, load_model_config, load_tokenizer, max_length, resolve_dtype
from scale_sft.model.resident import effective_values, read_entries, write_entries

from .answers import exact_match, greedy_answers, why_one_by_one
from .held_out import held_out_loss


def model_section(model: ModelConfig, adapter: Path | None, *, base_given: bool) -> ModelConfig:
    """Fill in the options of the model that an adapter knows: its base, revision and dtype."""
    if adapter is None:
        return model
    with Adapter.open(adapter) as opened:
        info = opened.info
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
) -> dict[str, Any] | None:
    """Evaluate on held-out data and tasks; returns the results on the main rank, None on the others.

    Args:
        tasks: of lm-evaluation-harness; see `harness.tasks_of`.
        limit: examples of each task; None for all.
        output: a file that gets the results as JSON.

    Raises:
        UserError: something is wrong with model, adapter, data or tasks.
    """
    from .harness import require_harness, run_tasks

    if tasks:
        require_harness()
    loaded = load_model_config(model_config)
    adapter = Adapter.load(adapter_folder) if adapter_folder else None
    if model_config.quantization != "none":
        raise UserError(
            f"eval: got --quantization {model_config.quantization}, expected none. Fix: merge and quantise with "
            "`scale-sft merge --quantize`"
        )
    if adapter and adapter.is_quantized:
        raise UserError(
            f"eval: got an adapter of a base in {adapter.info['quantization']} ({adapter_folder}), expected one of an "
            "unquantised base. Fix: merge it (scale-sft merge ADAPTER --output DIR) and evaluate the result "
            "(scale-sft eval --base DIR)"
        )
    tokenizer = use_template(load_tokenizer(model_config), data.chat_template)
    if adapter and data.chat_template is None and adapter.info.get("chat_template"):
        tokenizer.chat_template = adapter.info["chat_template"]
    data = replace(data, max_length=max_length(data.max_length, loaded))
    examples = None
    if data.eval_data:
        examples = load_examples(data.eval_data, "eval", tokenizer, data, data.max_eval_examples)
    refuse_misfit(tokenizer, loaded, examples or None)
    sharded = model_config.base_placement == "shard"
    dtype = resolve_dtype(model_config, loaded)
    cluster = Cluster.start(sharded=sharded, dtype=dtype, ds_config=model_config.ds_config)
    try:
        model = cluster.prepare(load_base(model_config, loaded, cluster.load_device)).eval()
        if adapter:
            apply_parts(model, adapter, cluster)
            settings: Any = model.generation_config
            settings.eos_token_id = with_end(settings.eos_token_id, adapter.info.get(INFO_KEY))
        result: dict[str, Any] = {"base": model_config.base, "adapter": adapter_folder and str(adapter_folder)}
        if examples:
            result["held_out"] = _held_out(model, tokenizer, examples, data, cluster, batch_size)
        if tasks:
            result["tasks"] = run_tasks(model, tokenizer, tasks, batch_size=batch_size, limit=limit)
        if cluster.is_main and output:
            write_json(output, result)
        return result if cluster.is_main else None
    finally:
        cluster.close()


def _held_out(
    model: nn.Module, tokenizer: Any, examples: Examples, data: DataConfig, cluster: Cluster, batch_size: int
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
    alone = why_one_by_one(model, tokenizer, cluster)
    if alone:
        result["note"] = alone
    answers = greedy_answers(
        model,
        tokenizer,
        examples,
        cluster,
        count=wanted,
        batch_size=1 if alone else batch_size,
        max_new_tokens=data.max_new_tokens,
    )
    if data.exact_match_examples:
        matching = answers[: data.exact_match_examples]
        result |= {"exact_match": exact_match(matching, data.answer_pattern), "exact_match_examples": len(matching)}
    result["samples"] = [asdict(answer) for answer in answers[: data.generation_samples]]
    return result


def for_people(result: dict[str, Any]) -> str:
    """Write the results as lines of text: held-out figures, tasks, samples."""
    lines = []
    held_out = result.get("held_out")
    if held_out:
        parts = [f"held-out loss {held_out['loss']:.4f}", f"perplexity {held_out['perplexity']:,.2f}"]
        if "exact_match" in held_out:
            parts.append(f"exact match {held_out['exact_match']:.1%} of {held_out['exact_match_examples']:,}")
        counts = [f"{held_out['examples']:,} examples", f"{held_out['target_tokens']:,} target tokens"]
        counts += [f"{held_out[name]:,} {what}" for name, what in _LOST.items() if held_out[name]]
        lines.append("  ".join([*parts, f"({', '.join(counts)})"]))
    tasks = result.get("tasks") or {}
    width = max(map(len, tasks), default=0)
    lines += [f"{task:<{width}}  {_task_figures(figures)}" for task, figures in tasks.items()]
    if held_out and "note" in held_out:
        lines.append(held_out["note"])
    for sample in (held_out or {}).get("samples", []):
        lines += ["", *(f"{name:<9}  {text}" for name, text in sample.items())]
    return "\n".join(lines)


_LOST = {"truncated": "cut to max_length", "dropped": "dropped, no target token left"}


def _task_figures(figures: dict[str, Any]) -> str:
    """Write the figures of one task, which lm-evaluation-harness calls `metric,filter` and `metric_stderr,filter`."""
    parts = []
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr"):
            continue
        error = figures.get(f"{metric}_stderr,{kind}")
        name = f"{metric} ({kind})" if kind not in ("", "none") else metric
        parts.append(f"{name} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    return "  ".join(parts) or "no figures"


@torch.no_grad()
def apply_parts(model: nn.Module, adapter: Adapter, cluster: Cluster) -> None:
    """Write an adapter's effective values into the parts of the weights that this rank holds.

    All weights are checked before the first is written.

    Raises:
        UserError: a weight is missing or has another size, or the base is not the adapter's.
    """
    parts = parts_held(require_fit(model, adapter), cluster.part_of)
    require_base(cluster.fingerprints(parts), adapter)
    for name, part in parts.items():
        where = part.slice_of(adapter.indices[name])
        entries = part.entries()
        places = (adapter.indices[name][where].long() - part.start).to(entries.device)
        deltas = adapter.deltas[name][where].to(entries.device)
        write_entries(entries, places, effective_values(read_entries(entries, places), deltas))
    cluster.written()
