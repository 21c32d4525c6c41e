"""`SpielConfig`: the options of a SpIEL adapter under PEFT, and the facts that its folder records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig

from scale_sft.config.loading import load_sections
from scale_sft.config.sparse_options import SparseConfig
from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError
from scale_sft.model.sparse_settings import rule_of

BUDGETS = ("density", "tunable_weights", "rank_equivalent")
DEFAULT_DENSITY = 0.01
METHODS = ("random", "static", "ag")
OPTIMIZER_STATES = ("carry", "reset")
KERNELS = ("off", "cpu", "auto")

_ELSEWHERE = {
    "start_from": "PeftModel.from_pretrained(base, folder, is_trainable=True) trains an adapter further",
    "delta_dtype": "deltas are parameters in float32 here",
    "proposal_batch_size": "the first backward pass of a step proposes here",
    "betas": "AdamW belongs to the Trainer; set its options there",
}


_OURS = "use `scale-sft train` or scale_sft.attach, which have this option"


class SpielType(str, Enum):
    """The name of the method among PEFT's."""

    SPIEL = "SPIEL"
    __str__ = str.__str__


@dataclass
class SpielOptions(PeftConfig):
    """The fields of `SpielConfig`.

    Options of the recipe section `sparse` have its names, defaults and checks; the others are PEFT's own.
    """

    method: str = field(
        default=SparseConfig.method,
        metadata={
            "help": "random: keep the entries drawn from the seed, which needs no number of steps and no callback; "
            "static: choose once, after the first estimation phase; ag: drop and grow by accumulated gradients."
        },
    )
    score: str = SparseConfig.score
    draw: str = SparseConfig.draw
    temperature: float = SparseConfig.temperature
    density: float | None = field(
        default=None, metadata={"help": "Fraction of each target weight that is trained (default: 0.01)."}
    )
    tunable_weights: int | None = field(default=None, metadata={"help": "Total number of trained entries, instead."})
    rank_equivalent: int | None = field(
        default=None, metadata={"help": "As many trained entries as LoRA of this rank has parameters, instead."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers to train, as PEFT reads them: names, one regular expression, or 'all-linear'. Default: "
            "all linear layers inside the transformer blocks."
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules that are trained and saved as a whole."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of blocks to train."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    update_interval_steps: int = SparseConfig.update_interval_steps
    estimation_steps: int = SparseConfig.estimation_steps
    initial_replacement_fraction: float = SparseConfig.initial_replacement_fraction
    replacement_schedule: str = SparseConfig.replacement_schedule
    candidate_ratio: float = SparseConfig.candidate_ratio
    drop_criterion: str = SparseConfig.drop_criterion
    total_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of the whole training (ag). In a Trainer the callback knows them."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the first entries."})
    kernels: str = field(default="auto", metadata={"help": "off, cpu or auto, as option kernels of scale-sft train."})
    optimizer_state: str = field(
        default="carry",
        metadata={
            "help": "What drop and grow do with the optimizer's state: carry it along with its entries, or reset it "
            "for each weight, which works with every optimizer."
        },
    )
    entries_per_weight: dict[str, int] | None = field(
        default=None, metadata={"help": "Active entries by weight of a finished adapter; overrides the budget."}
    )
    facts: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the adapter's folder records in addition: base_hash, shapes, ..."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SpielType.SPIEL
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name, known in (("method", METHODS), ("optimizer_state", OPTIMIZER_STATES), ("kernels", KERNELS)):
            _require_known(name, getattr(self, name), known)
        for name, least in (("seed", 0), ("total_steps", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"{name}: got {value!r}, expected a whole number of at least {least}. Fix: give one")
        if self.drop_criterion == "age":
            raise UserError(f"drop_criterion: got 'age', expected magnitude or change under PEFT. Fix: {_OURS}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern: got no layers_to_transform, expected both. Fix: say which blocks to train")
        self.sparse_options()

    def sparse_options(self) -> SparseConfig:
        """Return the options of section `sparse`, checked, with exactly one budget.

        Raises:
            UserError: a value is not possible, or there are two budgets.
        """
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"budget: got {' and '.join(given)}, expected one of them. Fix: leave out the others")
        shared = {one.name for one in dataclasses.fields(SparseConfig)} & {
            one.name for one in dataclasses.fields(SpielOptions)
        }
        options = {name: getattr(self, name) for name in shared - {"target_modules", "exclude_modules"}}
        options["selection_batches"] = 0  # a Trainer has no pass before its first step
        if not given:
            options["density"] = DEFAULT_DENSITY
        sparse = load_sections(None, options)["sparse"]
        rule_of(sparse, self.seed)
        if sparse.estimation_steps > sparse.update_interval_steps:
            raise UserError(
                f"estimation_steps: got {sparse.estimation_steps}, expected at most update_interval_steps "
                f"({sparse.update_interval_steps}). Fix: lower it"
            )
        return sparse


class SpielConfig(SpielOptions):
    """The configuration of a SpIEL adapter: `get_peft_model(model, SpielConfig(density=0.01))`.

    Options of the recipe section `sparse` have its names; see the fields of `SpielOptions`. A budget is one of density,
    tunable_weights and rank_equivalent; default: 1 % of each target weight.

    Raises:
        UserError: an option is unknown, or its value is not possible.
    """

    def __init__(self, *args: Any, **options: Any):
        names = [one.name for one in dataclasses.fields(SpielOptions)]
        others = {name: value for name, value in options.items() if name not in names}
        if others and "format" not in options:  # not read from a folder
            name = next(iter(others))
            sparse = {one.name: _OURS for one in dataclasses.fields(SparseConfig)}
            if fix := (sparse | _ELSEWHERE).get(name):
                raise UserError(f"{name}: got {others[name]!r}, expected none under PEFT. Fix: {fix}")
            raise UserError(f"SpielConfig: {unknown(f'option {name!r}', name, names)}")
        options = {name: value for name, value in options.items() if name in names}
        if others:
            options = _from_folder(options, others)
        super().__init__(*args, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return what adapter_config.json holds: the options but total_steps, and the facts on the same level."""
        options = {**dataclasses.asdict(self), "peft_type": SpielType.SPIEL.value}
        for name, value in options.items():
            if isinstance(value, set):
                options[name] = sorted(value)
        del options["total_steps"]  # of one training: the next one has its own
        return {**(options.pop("facts") or {}), **options}


def _from_folder(options: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Turn what an adapter folder records into options; the rest becomes `facts`."""
    options = {**options, "facts": facts}
    options["base_model_name_or_path"] = options.get("base_model_name_or_path") or facts.get("base")
    if options.get("method") not in METHODS:  # ma, or the result of arithmetic: its entries stay where they are
        options["facts"] = {**facts, "method": options.get("method")}
        options["method"] = "random"
    return options


def _require_known(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = ". Fix: train it with `scale-sft train` or scale_sft.attach" if value == "ma" else ""
        raise UserError(f"{name}: got {value!r}, expected {', '.join(known[:-1])} or {known[-1]}{hint}")
