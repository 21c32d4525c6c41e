"""scale_sft: sparse fine-tuning of large language models, on one GPU or many nodes.

On any number of ranks a run has the same batches and the same schedule, and the same sums up to rounding
(docs/cluster.md).

train            run a recipe: scale_sft.train("demo", steps=20) -> RunResult
RunResult        where a run has left its adapter, and its held-out results
attach           give a loaded transformers model sparse deltas to train: a `SparseModel`
SparseModel      a frozen model with sparse deltas: save them, leave them out for a moment, detach
SparseOptimizer  its `torch.optim.Optimizer`, which updates, drops and grows
Adapter          the result of a run: load, inspect, save
load_adapter     apply an adapter to a model in memory, swap it while the model serves, undo it
merge            write base + adapter as a plain transformers folder
UserError        what all of them raise for input that cannot work

Names are imported when they are first used: `import scale_sft` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scale_sft.version import __version__ as __version__

if TYPE_CHECKING:  # for editors and type checkers; at run time `train` is a module, which can be called
    from scale_sft.adapters.format import Adapter as Adapter
    from scale_sft.adapters.live import load_adapter as load_adapter
    from scale_sft.adapters.merge import merge as merge
    from scale_sft.api import attach as attach
    from scale_sft.errors import UserError as UserError
    from scale_sft.model.sparse_model import SparseModel as SparseModel
    from scale_sft.model.sparse_optimizer import SparseOptimizer as SparseOptimizer
    from scale_sft.train import run as train  # noqa: F401
    from scale_sft.training.result import RunResult as RunResult

_PUBLIC = {
    "Adapter": "scale_sft.adapters.format",
    "RunResult": "scale_sft.training.result",
    "SparseModel": "scale_sft.model.sparse_model",
    "SparseOptimizer": "scale_sft.model.sparse_optimizer",
    "UserError": "scale_sft.errors",
    "attach": "scale_sft.api",
    "load_adapter": "scale_sft.adapters.live",
    "merge": "scale_sft.adapters.merge",
    "train": "scale_sft.train",
}
"""Module of each public name."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    return module if name == "train" else getattr(module, name)  # a module that can be called


def __dir__() -> list[str]:
    return sorted(__all__)
