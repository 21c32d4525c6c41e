"""Rules that combine several options."""

from __future__ import annotations

from .methods import SEEDED
from .objective_options import ObjectiveConfig
from .options import Config
from .sparse_options import SparseConfig


def broken_rules(config: Config) -> list[str]:
    """Say what is wrong with options that are right one by one."""
    mistakes = []
    sparse, run = config.sparse, config.run
    given = {n: getattr(sparse, n) for n in ("density", "tunable_weights", "rank_equivalent") if getattr(sparse, n)}
    if len(given) > 1 or not (given or sparse.start_from):
        got = " and ".join(f"{name} {value}" for name, value in given.items()) or "none"
        mistakes.append(
            f"budget: got {got}, expected exactly one of density, tunable_weights, rank_equivalent "
            "(for example --density 0.02)"
        )
    mistakes += broken_selection(sparse)
    if run.steps and run.epochs:
        mistakes.append(f"length: got steps {run.steps} and epochs {run.epochs}, expected one of them")
    if sparse.estimation_steps > sparse.update_interval_steps:
        mistakes.append(
            f"estimation_steps: got {sparse.estimation_steps}, must not exceed update_interval_steps "
            f"({sparse.update_interval_steps}), the distance between two reallocations"
        )
    micro = run.micro_batch_size
    if micro and run.global_batch_size % micro:
        divisors = [d for d in range(1, run.global_batch_size + 1) if run.global_batch_size % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - micro))
        mistakes.append(
            f"micro_batch_size: global_batch_size {run.global_batch_size} does not divide by {micro}; "
            f"nearest that does: {nearest}"
        )
    if sparse.proposal_batch_size and sparse.proposal_batch_size > run.global_batch_size:
        mistakes.append(
            f"proposal_batch_size: got {sparse.proposal_batch_size}, must not exceed global_batch_size "
            f"({run.global_batch_size})"
        )
    for name in ("exact_match_examples", "generation_samples"):
        if getattr(config.data, name) and not config.data.eval_data:
            mistakes.append(f"{name}: needs eval_data")
    if run.early_stopping_steps and not (run.eval_every_steps and config.data.eval_data):
        mistakes.append("early_stopping_steps: needs eval_data and eval_every_steps")
    return mistakes + _broken_rules_of_objective(config)


_ONLY_WITH = {
    "label_smoothing": ("dpo",),
    "length_normalised": ("dpo",),
    "sft_weight": ("dpo", "ipo", "orpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "router_aux_loss": ("sft",),
    "reference_adapter": ("dpo", "ipo", "kto"),
}
"""Objectives that read an option; with any other it must be left at its default."""


def _broken_rules_of_objective(config: Config) -> list[str]:
    mistakes, given, defaults = [], config.objective, ObjectiveConfig()
    for name, objectives in _ONLY_WITH.items():
        value = getattr(given, name)
        if value != getattr(defaults, name) and given.objective not in objectives:
            mistakes.append(
                f"{name}: got {value} with objective {given.objective}, expected objective {' or '.join(objectives)}. "
                f"Fix: leave {name} out, or choose such an objective"
            )
    if given.reference_kind == "none" and given.objective in ("dpo", "ipo", "kto"):
        mistakes.append(
            f"reference: got none with objective {given.objective}, expected precomputed or swapped. "
            "Fix: leave reference out"
        )
    if given.reference not in ("auto", "none") and given.objective in ("sft", "orpo"):
        mistakes.append(
            f"reference: got {given.reference} with objective {given.objective}, which has no reference. "
            "Fix: leave reference out"
        )
    if given.objective != "sft" and config.data.loss_on == "all":
        mistakes.append(
            f"loss_on: got all with objective {given.objective}, expected completion or assistant: both sides share "
            "their prompt. Fix: leave loss_on out"
        )
    if given.objective == "kto" and config.data.loss_on == "assistant":
        mistakes.append(
            "loss_on: got assistant with objective kto, expected completion: an answer is one turn, which other "
            "prompts borrow. Fix: leave loss_on out"
        )
    if given.best_by == "accuracy" and not given.pairs:
        mistakes.append(
            f"best_by: got accuracy with objective {given.objective}, expected loss: only pairs have an accuracy. "
            "Fix: leave best_by out"
        )
    return mistakes


def broken_selection(sparse: SparseConfig) -> list[str]:
    """Say which options of the selection contradict each other, or would do nothing."""
    mistakes = []
    default = SparseConfig()
    given = [name for name in ("score", "draw", "selection_batches") if getattr(sparse, name) != getattr(default, name)]
    given += ["budget"] * (sparse.budget == "global")
    growth = ("exchange_if_better", "seed_moments", "growth_warmup_steps")
    moved = next((name for name in growth if getattr(sparse, name) != getattr(default, name)), None)
    if moved and sparse.method in ("ma", *SEEDED):
        mistakes.append(
            f"{moved}: got {getattr(sparse, moved)} with method {sparse.method}, expected ag or static: "
            "only they keep moments of entries that grow by gradient"
        )
    if sparse.exchange_if_better and sparse.score in ("weight", "gradient_weight"):
        mistakes.append(
            f"exchange_if_better: got it with score {sparse.score}, expected a score of gradients alone: the "
            "weights under active entries are not compared"
        )
    if sparse.method == "random" and given:
        mistakes.append(
            f"{given[0]}: got {getattr(sparse, given[0])} with method random, which chooses from the seed alone. Fix: "
            f"leave it out, or use method static"
        )
        return mistakes
    first = sparse.selection_batches > 0
    if sparse.method == "columns" and given and not first:
        mistakes.append(
            f"{given[0]}: got {getattr(sparse, given[0])} with method columns, which without selection_batches draws "
            "columns from the seed alone. Fix: --selection_batches 20, or leave it out"
        )
    mistakes += _broken_granularity(sparse)
    if sparse.method == "ma" and given and not first:
        mistakes.append(
            f"{given[0]}: got {getattr(sparse, given[0])} with method ma, which grows by its accumulators, expected "
            "selection_batches of at least 1: only the first choice can follow a score"
        )
    if first and sparse.start_from:
        mistakes.append("selection_batches: got a number with start_from, whose entries are chosen already. Fix: use 0")
    if sparse.budget == "global" and not first:
        mistakes.append(
            "budget: got global without selection_batches, expected at least 1: the ranking needs gradients"
        )
    quotas = [name for name in ("row_quota", "column_quota") if getattr(sparse, name) is not None]
    if quotas and not first:
        mistakes.append(f"{quotas[0]}: got a quota without selection_batches, expected at least 1")
    if sparse.selection_pool is not None and not first:
        mistakes.append("selection_pool: got a number without selection_batches, expected at least 1 of them")
    elif sparse.selection_pool is not None and (quotas or sparse.trains_whole != "entry"):
        why = quotas[0] if quotas else f"granularity {sparse.trains_whole}"
        mistakes.append(
            f"selection_pool: got {sparse.selection_pool:g} with {why}, which needs all entries. Fix: leave it out"
        )
    if len(quotas) == 2 and min(getattr(sparse, name) for name in quotas) < 2:
        mistakes.append(
            "row_quota and column_quota: got one below 2, which together may not hold the budget, expected at least 2 "
            "each, or one of them"
        )
    return mistakes


def _broken_granularity(sparse: SparseConfig) -> list[str]:
    """Say which options contradict training whole columns, rows or blocks."""
    kind, mistakes = sparse.trains_whole, []
    if sparse.method == "columns" and kind != "column":
        mistakes.append(
            f"granularity: got {kind} with method columns, expected column. Fix: leave it out, or --method random"
        )
    if kind == "entry":
        return mistakes
    if sparse.method == "ma":
        mistakes.append(
            f"granularity: got {kind} with method ma, which moves single entries. Fix: --method ag moves whole columns "
            "or rows; columns, random and static keep them"
        )
    elif kind == "block" and sparse.proposes:
        how = " without selection_batches" if sparse.method == "static" else ""
        mistakes.append(
            f"granularity: got block with method {sparse.method}{how}, which replaces what it trains, expected column "
            "or row. Fix: --granularity column, --method random, or static with selection_batches"
        )
    if sparse.method == "ag" and sparse.score not in ("gradient", "random") and not sparse.selection_batches:
        mistakes.append(
            f"score: got {sparse.score} with method ag and granularity {kind}, which grow by norms of gradients, "
            "expected selection_batches of at least 1: only the first choice can follow a score"
        )
    if sparse.budget == "global":
        mistakes.append(
            f"budget: got global with granularity {kind}, expected weight or rank: one ranking of all weights holds "
            "for single entries"
        )
    for quota in ("row_quota", "column_quota"):
        if getattr(sparse, quota) is not None:
            mistakes.append(
                f"{quota}: got {getattr(sparse, quota)} with granularity {kind}, whose entries crowd by design. Fix: "
                "leave it out"
            )
    return mistakes
