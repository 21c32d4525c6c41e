"""The model card of an adapter or an exported model: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from scale_sft.config.options import DEMO
from scale_sft.files import write_text
from scale_sft.reporting.metrics_file import METRICS_FILE, read_metrics

from .format import Adapter

_SETTINGS = {
    "sparse": ("method", "density", "tunable_weights", "rank_equivalent", "update_interval_steps", "estimation_steps",
               "initial_replacement_fraction", "replacement_schedule", "candidate_ratio", "drop_criterion"),
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
    adapter_folder: str | Path, target: str | Path | None = None, *, form: str = "adapter", licence: str | None = None
) -> Path:
    """Write README.md for an adapter folder; what is known of its run (settings, results) is read beside it.

    Args:
        target: the folder to describe; default: the adapter folder itself.
        form: adapter, shira, supertuning or merged.
        licence: identifier as the hub knows it ("apache-2.0"); default: that of the base where it is stated locally.
    """
    adapter_folder = Path(adapter_folder)
    target = Path(target or adapter_folder)
    with Adapter.open(adapter_folder) as adapter:
        text = _card(adapter, adapter_folder.resolve().parent, target.name.strip("."), form, licence)
    write_text(target / "README.md", text)
    return target / "README.md"


def _card(adapter: Adapter, run: Path, folder: str, form: str, licence: str | None) -> str:
    info = adapter.info
    base = "the small model that ships with scale_sft" if info["base"] == DEMO else info["base"]
    settings = _read_settings(run)
    active = adapter.active()
    everything = sum(o * i for o, i in adapter.shapes.values())
    facts = {
        "base model": f"{base}" + (f", revision {info['revision']}" if info.get("revision") else ""),
        "hash of the base's target weights": f"`{info['base_hash'][:16]}`",
        "method": info.get("method"),
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
    results = _results(run)
    if results:
        parts.append("## Results\n\n" + _table(("held out", "value"), results))
    if options:
        parts.append("## Training\n\n" + _table(("option", "value"), options))
    return "\n".join(parts)


def _front_matter(info: dict[str, Any], form: str, licence: str | None) -> str:
    """The card's metadata; without a stated licence the hub shows `unknown`."""
    local = Path(info["base"]) / "README.md"
    meta: dict[str, Any] = {
        "license": licence or _licence_of(local) or "unknown",
        "library_name": {"shira": "peft", "supertuning": "peft", "merged": "transformers"}.get(form, "scale_sft"),
        "pipeline_tag": "text-generation",
        "tags": ["sparse-fine-tuning", "spiel", f"method:{info.get('method')}"],
    }
    if info["base"] != DEMO and not Path(info["base"]).exists():
        meta["base_model"] = info["base"]
        meta["base_model_relation"] = "finetune" if form == "merged" else "adapter"
    return f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n"


def _licence_of(card: Path) -> str | None:
    try:
        head = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
        return str(head["license"])
    except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None


def _read_settings(run: Path) -> dict[str, dict[str, Any]]:
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _results(run: Path) -> dict[str, str]:
    """Held-out figures before and after, where the run has them."""
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
