"""The contestants of `bench quality`: this trainer's methods, variants of them, and their alternatives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scale_sft.config.options import OPTIONS
from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError

_NEVER = 10**9  # steps: an interval longer than any run


@dataclass(frozen=True)
class Contestant:
    """A way of fine-tuning, and the learning rates to try with it."""

    name: str
    kind: str  # base, ours, peft-lora, peft-lora-rs, peft-ia3 or full
    learning_rates: tuple[float, ...]
    options: Mapping[str, str] = field(default_factory=dict)  # of the configuration

    @property
    def trains(self) -> bool:
        return self.kind != "base"


BASE = Contestant("base", "base", ())
"""The untrained model, the starting point of all."""

_CHOICE = {"selection_batches": "20", "score": "balanced", "draw": "sample"}
"""The first choice of the sampled contestants: balanced scores of 20 batches."""

_BETWEEN_SETTINGS = re.compile(r",(?=\w+=)")
"""A comma that ends a setting of a variant, unlike those of a value such as 0.9,0.99."""

_LARGEST = {"selection_batches": "0", "score": "gradient", "draw": "top"}
"""Those of the largest gradients after the first estimation phase."""

_USUAL = {"betas": "0.9,0.999"}
"""AdamW as others use it. This trainer's default is for sparse deltas."""

_OF_LORA = {**_USUAL, "warmup_fraction": "0.0"}
"""LoRA ended better without warm-up (docs/selection.md): half of it starts at 0, which is a warm-up of its own."""

METHODS = {
    contestant.name: contestant
    for contestant in (
        Contestant("random", "ours", (5e-3, 1e-2, 2e-2), {"method": "random"}),
        Contestant(
            "static-sampled",
            "ours",
            (5e-3, 1e-2, 2e-2),
            {"method": "static", **_CHOICE, "selection_pool": "8", "temperature": "0.5"},
        ),
        Contestant(
            "ag-sampled",
            "ours",
            (5e-3, 1e-2, 2e-2),
            {"method": "ag", **_CHOICE, "temperature": "1", "seed_moments": "false"},
        ),
        Contestant("columns", "ours", (5e-3, 1e-2, 2e-2), {"method": "columns"}),
        Contestant(
            "columns-sampled", "ours", (5e-3, 1e-2, 2e-2), {"method": "columns", **_CHOICE, "temperature": "0.5"}
        ),
        Contestant(
            "columns-grown",
            "ours",
            (5e-3, 1e-2, 2e-2),
            {"method": "ag", "granularity": "column", **_CHOICE, "temperature": "0.5"},
        ),
        Contestant("ag", "ours", (3e-3, 1e-2, 3e-2), {"method": "ag"}),
        Contestant("ma", "ours", (3e-2, 1e-1, 3e-1), {"method": "ma"}),
        Contestant("static", "ours", (3e-3, 1e-2, 3e-2), {"method": "static", **_LARGEST}),
        Contestant("lora", "peft-lora", (2e-3, 5e-3, 1e-2), _OF_LORA),
        Contestant("lora-rs", "peft-lora-rs", (2e-3, 5e-3, 1e-2), _OF_LORA),
        Contestant("ia3", "peft-ia3", (3e-2, 1e-1, 3e-1), _USUAL),
        Contestant("full", "full", (3e-4, 1e-3, 3e-3), _USUAL),
    )
}
"""Default contestants with the start of their grids: a sparse delta needs far higher rates than a dense weight."""

EARLIER_NAMES = {
    "ours-ag": "ag",
    "ours-ma": "ma",
    "ours-static": "static",
    "random-mask": "random",
    "peft-lora": "lora",
    "peft-ia3": "ia3",
}
"""Names of contestants before, which the command still takes."""

SET_BY_THE_BENCH = (
    *("learning_rate", "seed", "steps", "epochs", "density", "tunable_weights", "start_from", "output_dir", "resume"),
)
"""Options that a variant cannot set: they form the grid, or are the same for all."""
OF_PEERS = ("betas", "eps", "weight_decay", "warmup_fraction", "lr_schedule")
"""Options that a variant of LoRA, IA3 or full tuning can set."""


def choose(methods: Sequence[str], variants: Sequence[str], grids: Sequence[str]) -> list[Contestant]:
    """Choose the contestants of a run, in the order in which they are named.

    Args:
        methods: names of METHODS; empty: all of them.
        variants: `NAME=METHOD,option=value,...` each.
        grids: `NAME=rate,rate,...` each.

    Raises:
        UserError: a name or option is unknown, a name is taken, or a rate is invalid.
    """
    methods = [present_name(name) for name in methods]
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--methods: {unknown(f'method {name!r}', name, METHODS)}")
    found = {name: METHODS[name] for name in methods or METHODS}
    for text in variants:
        variant = _variant(text)
        if variant.name in (*METHODS, *EARLIER_NAMES) or variant.name in found or variant.name == BASE.name:
            raise UserError(f"--variant: the name '{variant.name}' is taken; choose another")
        found[variant.name] = variant
    for text in grids:
        name, _, rates = text.partition("=")
        name = name if name in found else present_name(name)
        if name not in found:
            raise UserError(f"--learning_rates: {unknown(f'method {name!r}', name, found)}")
        found[name] = replace(found[name], learning_rates=_rates(name, rates))
    return list(found.values())


def present_name(name: str) -> str:
    """Return what a contestant is called now."""
    return EARLIER_NAMES.get(name, name)


def _variant(text: str) -> Contestant:
    """Parse `NAME=METHOD,option=value,...`, a contestant with other options: a peer with those of its optimizer."""
    name, _, rest = text.partition("=")
    method, *settings = _BETWEEN_SETTINGS.split(rest)
    method = present_name(method)
    if not name or not settings:
        raise UserError(
            f"--variant: got '{text}', expected NAME=METHOD,option=value such as slim=ag,candidate_ratio=0.5"
        )
    if method not in METHODS:
        raise UserError(f"--variant {name}: {unknown(f'method {method!r}', method, METHODS)}")
    kind, options = METHODS[method].kind, dict(METHODS[method].options)
    for setting in settings:
        option, equals, value = setting.partition("=")
        if option not in OPTIONS:
            raise UserError(f"--variant {name}: {unknown(f'option {option!r}', option, OPTIONS)}")
        if not equals or option in SET_BY_THE_BENCH:
            raise UserError(
                f"--variant {name}: got '{setting}', expected option=value, none of {', '.join(SET_BY_THE_BENCH)}"
            )
        if kind != "ours" and option not in OF_PEERS:
            raise UserError(
                f"--variant {name}: got '{setting}', expected an option that {method} has: {', '.join(OF_PEERS)}"
            )
        options[option] = value
    return Contestant(name, kind, METHODS[method].learning_rates, options)


def _rates(name: str, text: str) -> tuple[float, ...]:
    try:
        rates = sorted({float(rate) for rate in text.split(",")})
        if not all(0 < rate < float("inf") for rate in rates):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--learning_rates {name}: got '{text}', expected numbers above 0 with commas, as in 1e-3,3e-3"
        ) from None
    return tuple(rates)
