"""The page with the table of model types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from .findings import COLUMNS, TRAINS, Findings

HEAD = """# Models

Any model of transformers that generates text can be a base: causal language models, and the text part of
vision-language models (the vision tower stays frozen, and a merge writes the whole model). What a base cannot do is
found out before its weights are loaded wherever that is possible, and said in one line.

- Layers that a pass over text never reaches, weights that are used past their module's forward, and subclasses of
  `nn.Linear` that compute something else are left out, and named at the start with their share of the weights.
  `--exclude_modules` leaves out more. `scale-sft plan` and `scale-sft inspect` say the same.
- `--attention auto`, the default, takes sdpa where the model has it, otherwise eager.
- Dropout and the jitter of routers are off, at any depth of the configuration. A forward pass that samples all the
  same is refused, or allowed with `--allow_randomness true`: such a run does not repeat.
- Each expert's slice of a parameter of three dimensions is a weight of its own, and is trained; routers stay frozen
  unless they are named (docs/experts.md). Experts that a model fuses in a way of its own (dbrx) are left out, and named
  with their share.
- Images, videos and sounds in the data are refused.

## Check a model of your own

A tiny random model with the switches of your base's config.json goes through all of it in seconds, and no weights are
loaded:

    source .venv/bin/activate
    scale-sft models check --base path/to/your/model
    scale-sft models check llama qwen3_moe

## What was checked

`scale-sft models check --write docs` made this table {when}with transformers {version} and torch {torch}. Each type
is a tiny random model of its own configuration, two layers of width 64, and goes through the trainer's own code on a
CPU. Name types to check some of them again; without names the command checks those whose row another version of the
code made. docs/models.jsonl has the same rows for programs.

- **trains**: two steps with drop and grow. *with allow_randomness*: its forward pass samples in training mode.
- **reached**: the share of the weights inside the blocks (matrices) that are targets by default; the remark says why
  the rest is not. The vision towers of tiny wrappers are out of proportion. **experts reached**: the same of the
  weights of routed experts.
- **gradient**: the largest difference of any entry's gradient from that of autograd on a stock model, over the
  largest entry of its weight's gradient.
- **merge**: logits of the merged folder are those of the base with the adapter in place, bit for bit; unmerging
  gives the bytes of the base.
- **checkpointing**: gradients with `--gradient_checkpointing true` are the same.
- **packing**: examples in one row do not see each other (proved on the model). **4 bits**: trained and merged in nf4;
  the share of all weights that are packed.
- **ZeRO-3**: the same run on two ranks (gloo), its base in ZeRO-3 shards, ends with the losses and the adapter of one
  rank; in brackets the share of entries that are the same, where rounding chose others. *trains*: its forward pass
  samples, so that there is nothing to compare.
- **answers**: *in batches*, or *one at a time* where a model reads padding on the left as text.

"""


def page(findings: Sequence[Findings], when: str = "") -> str:
    """Write the page for these findings; `when`: the date, as part of a sentence."""
    rows = [f"| type | {' | '.join(COLUMNS)} | remark |", "|" + "---|" * (len(COLUMNS) + 2)]
    for found in sorted(findings, key=lambda one: one.model_type):
        cells = (_plain(found.cells.get(name, "")) for name in COLUMNS)
        rows.append(f"| {found.model_type} | {' | '.join(cells)} | {_plain(found.remark.strip())} |")
    head = HEAD.format(version=version("transformers"), torch=version("torch"), when=when)
    return head + summary(findings) + "\n\n" + "\n".join(rows) + "\n"


def summary(findings: Sequence[Findings]) -> str:
    """Count types in one line: tried, trained, without failures, and refused by column."""
    trained = sum(found.trains for found in findings)
    clean = sum(found.clean for found in findings)
    refused = Counter(name for found in findings for name, cell in found.cells.items() if cell == "refused")
    listed = ", ".join(f"{'training' if name == TRAINS else name} in {count}" for name, count in refused.most_common())
    return f"{len(findings)} types were tried: {trained} train, {clean} of them without a failure in any column." + (
        f" Refused by name: {listed}." if listed else ""
    )


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
