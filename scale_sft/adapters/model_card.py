"""The model card of an adapter or an exported model: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scale_sft.config.options import DEMO
from scale_sft.data.new_tokens import command_of
from scale_sft.files import write_text
from scale_sft.reporting.metrics_file import METRICS_FILE, read_metrics

from .format import Adapter, opened

_SETTINGS = {
    "sparse": ("method", "density", "tunable_weights", "rank_equivalent", "start_from", "update_interval_steps",
               "estimation_steps", "initial_replacement_fraction", "replacement_schedule", "candidate_ratio",
               "drop_criterion"),
    "optimizer": ("learning_rate", "betas", "eps", "weight_decay", "max_grad_norm", "warmup_fraction", "lr_schedule"),
    "data": ("train_data", "eval_data", "max_length", "loss_on"),
    "run": ("steps", "epochs", "global_batch_size", "seed"),
}  # fmt: skip
_USE = {
    "adapter": """```python
import scale_sft
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")
live = scale_sft.load_adapter(model, "{folder}")   # in place; live.undo() gives the base back, bit for bit
```""",
    "shira": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")
model = PeftModel.from_pretrained(model, "{folder}")
```""",
    "merged": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="{dtype}")
```""",
}
_USE["supertuning"] = _USE["shira"]


def write_card(
    adapter: str | Path | Adapter,
    target: str | Path | None = None,
    *,
    form: str = "adapter",
    name: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write README.md for an adapter or what was made from it, with settings and results of the run next to it.

    Args:
        adapter: the adapter/ folder of a run; an adapter in memory has no run to tell about.
        target: the folder to describe; default: the adapter folder itself.
        form: adapter, shira, supertuning or merged.
        name: what the folder is called once it is finished; default: what it is called now.
        licence: identifier as the hub knows it ("apache-2.0"); default: that of the base where it is stated locally.
    """
    run = None if isinstance(adapter, Adapter) else Path(adapter).expanduser().resolve().parent
    folder = target if target is not None else adapter
    if isinstance(folder, Adapter):
        raise TypeError("write_card: an adapter in memory needs a target folder")
    folder = Path(folder).expanduser()
    with opened(adapter) as content:
        text = _card(content, run, name or folder.resolve().name, form, licence)
    write_text(folder / "README.md", text)
    return folder / "README.md"


def _card(adapter: Adapter, run: Path | None, folder: str, form: str, licence: str | None) -> str:
    info = adapter.info
    base = "the small model that ships with scale_sft" if info["base"] == DEMO else info["base"]
    settings = _read_settings(run) if run else {}
    active = adapter.active()
    everything = sum(o * i for o, i in adapter.shapes.values())
    facts = {
        "base model": f"{base}" + (f", revision {info['revision']}" if info.get("revision") else ""),
        "base made with": f"`{made}`" if (made := command_of(Path(info["base"]))) else None,
        "hash of the base's target weights": f"`{info['base_hash'][:16]}`",
        "method": info.get("method"),
        **({"trained whole": f"{info['granularity']}s"} if "granularity" in info else {}),
        "trained entries": f"{active:,} of {everything:,} in {len(adapter.shapes)} weights ({active / everything:.2%})",
        "dtype of the base": info["dtype"],
        "rounding rule": f"`{info.get('rounding_rule')}`",
        "made with": f"scale_sft {info.get('scale_sft_version')}",
    }
    if info.get("made_from"):
        facts["made from"] = f"`{json.dumps(info['made_from'], ensure_ascii=False)}`"
    options = {
        name: settings[section][name]
        for section, names in _SETTINGS.items()
        for name in names
        if settings.get(section, {}).get(name) is not None
    }
    use = _USE[form].format(
        base="scale_sft/assets/demo/base" if info["base"] == DEMO else info["base"], dtype=info["dtype"], folder=folder
    )
    parts = [
        _front_matter(info, form, licence),
        f"# Sparse fine-tuning of {base}\n\nA sparse delta of the base model: "
        f"{active / everything:.2%} of its target weights were moved, the rest is untouched.\n",
        _table(("", ""), facts),
        f"## Use\n\n{use}\n",
    ]
    results = _results(run) if run else {}
    if results:
        parts.append("## Results\n\n" + _table(("held out", "value"), results))
    if options:
        parts.append("## Training\n\n" + _table(("option", "value"), options))
    return "\n".join(parts)


def _front_matter(info: dict[str, Any], form: str, licence: str | None) -> str:
    """Build the card's metadata as the hub defines it; a licence that is not stated is `unknown`."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=licence or _licence_of(Path(info["base"]) / "README.md") or "unknown",
        library_name={"shira": "peft", "supertuning": "peft", "merged": "transformers"}.get(form, "scale_sft"),
        pipeline_tag="text-generation",
        tags=["sparse-fine-tuning", "spiel", f"method:{info.get('method')}"],
    )
    if info["base"] != DEMO and not Path(info["base"]).exists():
        data.base_model = info["base"]
        data["base_model_relation"] = "finetune" if form == "merged" else "adapter"
    return f"---\n{data.to_yaml()}\n---\n"


def _licence_of(card: Path) -> str | None:
    """Read the licence that a local model card states."""
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # no card, or a card without metadata
        return None
    return licence if isinstance(licence, str) else None


def _read_settings(run: Path) -> dict[str, dict[str, Any]]:
    """Read the options of a run; a learning rate that was not given is the one that the finished run chose."""
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        settings = {}
    optimizer = settings.setdefault("optimizer", {})
    if optimizer.get("learning_rate") is None:
        optimizer["learning_rate"] = _peak_rate(run)
    return settings


def _peak_rate(run: Path) -> float | None:
    """Read the learning rate of a finished run."""
    records = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    return next((record.get("learning_rate") for record in reversed(records) if record.get("event") == "end"), None)


def _results(run: Path) -> dict[str, str]:
    """Read held-out figures before and after training, where the run has them."""
    if not (run / METRICS_FILE).is_file():
        return {}
    found = [record for record in read_metrics(run / METRICS_FILE) if record.get("event") == "eval"]
    if len(found) < 2:
        return {}
    first, last = found[0], found[-1]
    rows = {}
    for key, name in (("loss", "loss"), ("perplexity", "perplexity"), ("exact_match", "exact match")):
        if isinstance(first.get(key), float) and isinstance(last.get(key), float):
            rows[name] = f"{first[key]:.4f} before, {last[key]:.4f} after {last['step']} steps"
    return rows


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [
        f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items() if value is not None
    ]
    return "\n".join(lines) + "\n"
