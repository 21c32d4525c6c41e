"""Rules that combine several options."""

from __future__ import annotations

from .options import Config


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
    return mistakes
