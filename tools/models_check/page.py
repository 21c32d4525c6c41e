"""The page with the table of model types."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from .check import Findings

COLUMNS = ("trains", "reached", "gradient", "merge", "checkpointing", "packing", "4 bits", "answers")

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
- Experts that a model keeps in one parameter of three dimensions carry no deltas yet: of such models only attention,
  shared experts and dense layers are trained.
- Images, videos and sounds in the data are refused.

`python -m tools.models_check --write` made this table with transformers {version} and torch {torch}. Each type is a
tiny random model of its own configuration, two layers of width 64, and goes through the trainer's own code on a CPU.
Name types to check some of them again.

- **trains**: two steps with drop and grow. *with allow_randomness*: its forward pass samples in training mode.
- **reached**: the share of the weights inside the blocks (matrices) that are targets by default; the remark says why
  the rest is not. The vision towers of tiny wrappers are out of proportion.
- **gradient**: the largest difference of any entry's gradient from that of autograd on a stock model, over the
  largest entry of its weight's gradient.
- **merge**: logits of the merged folder are those of the base with the adapter in place, bit for bit; unmerging
  gives the bytes of the base.
- **checkpointing**: gradients with `--gradient_checkpointing true` are the same.
- **packing**: examples in one row do not see each other (proved on the model). **4 bits**: trained and merged in nf4;
  the share of all weights that are packed.
- **answers**: *in batches*, or *one at a time* where a model reads padding on the left as text.

"""


def page(findings: Sequence[Findings]) -> str:
    """Write the page for these findings."""
    rows = [f"| type | {' | '.join(COLUMNS)} | remark |", "|" + "---|" * (len(COLUMNS) + 2)]
    for found in sorted(findings, key=lambda one: one.model_type):
        cells = (_plain(found.cells.get(name, "")) for name in COLUMNS)
        rows.append(f"| {found.model_type} | {' | '.join(cells)} | {_plain(found.remark.strip())} |")
    good = sum(not found.failures and found.cells.get("trains") != "refused" for found in findings)
    total = f"{good} of {len(findings)} types train and have no failure in any column.\n\n"
    return HEAD.format(version=version("transformers"), torch=version("torch")) + total + "\n".join(rows) + "\n"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
