"""Algorithm 1 of the paper over a real model: update, drop, grow. The entry point of every run.

scale-sft train --config demo [--nproc N] [--option value ...]
accelerate launch scale_sft/train.py --config demo [--option value ...]      in a clone
accelerate launch -m scale_sft.train --config demo [--option value ...]      installed
scale_sft.train("demo", steps=20)                                            in Python: this module is callable
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if __package__ in (None, ""):  # run as a file: its folder must not hide libraries, its package must be found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import click

from scale_sft.config.click_options import SuggestingCommand, with_config_options
from scale_sft.config.loading import load
from scale_sft.config.options import Config
from scale_sft.distributed.signals import Interrupted, Interruption
from scale_sft.errors import UserError, explain

if TYPE_CHECKING:
    from torch import Tensor

    from scale_sft.training.result import RunResult


IMPROVED = {"loss": "fallen", "accuracy": "risen"}


def train(session, metrics, checkpoints) -> None:
    """Run T optimizer steps, each on one global batch, with drop and grow where the schedule says so.

    The loop ends early if the held-out loss stops falling; `session.step` counts the completed steps.

    Raises:
        UserError: the loss or the gradient is NaN or infinite; the last good state has been saved.
        Interrupted: a signal asks the run to stop; `session.step` counts the completed steps.
    """
    from scale_sft.training.best import best_step, hopeless

    optimizer, cluster, best_by = session.optimizer, session.cluster, session.inputs.config.objective.best_by
    select_entries(session, metrics)
    evaluate_if_due(session, metrics, checkpoints.run)
    for step in range(session.step + 1, session.inputs.steps + 1):
        if hopeless(session.evaluations, session.step, session.inputs.config.run.early_stopping_steps, best_by):
            since = best_step(session.evaluations, best_by)
            metrics.note(f"stopped: the held-out {best_by} has not {IMPROVED[best_by]} since step {since}")
            return
        began = time.perf_counter()

        # --- forward and backward over the micro-batches: the recorder receives the gradients -----------------
        optimizer.begin()
        loss, tokens = forward_backward(session, session.inputs.order.batch(step))
        optimizer.reduce()
        grad_norm = optimizer.clip().item()
        if step == 1:
            optimizer.refuse_dead_gradients()

        # --- update, drop, grow ---------------------------------------------------------------------------------
        finite = finite_or_stop(session, metrics, checkpoints, loss, grad_norm)
        if finite:
            optimizer.update()
        if optimizer.reallocates:
            reallocate(session, metrics, step)
        optimizer.end()

        if finite:
            metrics.step(
                step,
                loss=loss,
                learning_rate=optimizer.learning_rate,
                grad_norm=grad_norm,
                tokens=tokens["all"],
                target_tokens=tokens["target"],
                seconds=time.perf_counter() - began,
                padding_fraction=tokens["padding"] / (tokens["padding"] + tokens["all"]),
                **measurements(cluster),
                **{name: value for name, value in tokens.items() if name not in ("target", "all", "padding")},
            )
        evaluate_if_due(session, metrics, checkpoints.run)
        checkpoints.save_if_due(metrics)
        cluster.raise_if_stopping()


def forward_backward(session, batch: list[int]) -> tuple[float, dict[str, float]]:
    """Compute the gradients of one global batch's loss: a mean over its target tokens, or over its pairs of answers.

    Each micro-batch contributes its share of that mean, so the split into ranks and micro-batches does not matter.
    Returns the mean loss, and counts of tokens: target, all, and padding that was computed with them; of preferences
    also what `objective.rewards` reports.
    """
    proposing = session.tuning.recorder.proposing
    share = session.objective.share(batch, proposing=proposing)
    total: float | Tensor = 0.0
    for micro_batch in session.micro_batches(batch, proposing=proposing):
        loss = share.loss_sum(session.model, micro_batch)
        loss.backward()
        total += loss.detach()
    mean, *sums = session.cluster.sum_and_agree(float(total), *share.sums)
    return mean, share.counts(sums)


def select_entries(session, metrics) -> None:
    """Choose the entries before the first update, from the gradients of `selection_batches` global batches.

    The batches are the first of the training order; nothing is trained. Without the option the first entries are
    random.
    """
    from scale_sft.model.first_choice import choose_entries

    inputs, cluster = session.inputs, session.cluster
    sparse, count = inputs.config.sparse, inputs.config.sparse.selection_batches
    if not count or session.step:
        return

    def run(number: int) -> None:
        forward_backward(session, inputs.order.batch((number - 1) % inputs.steps + 1))
        cluster.raise_if_stopping()

    began = time.perf_counter()
    with metrics.phase("choosing entries"):
        choose_entries(session.sparse, (partial(run, number) for number in range(1, count + 1)))
    how = "the best" if sparse.draw == "top" else f"sampled at temperature {sparse.temperature:g}"
    seconds, kind = time.perf_counter() - began, sparse.trains_whole
    what = "entries" if kind == "entry" else f"{kind}s"
    metrics.note(
        f"{what}: {how} by {sparse.score} (selection_batches {count}), before the first update: {seconds:.1f} s"
    )


def reallocate(session, metrics, step: int) -> None:
    """Drop and grow in every weight, and record the turnover."""
    began = time.perf_counter()
    turnover, tuning = session.optimizer.reallocate(), session.tuning
    if turnover is None:
        return
    metrics.reallocation(
        step,
        number=turnover.number,
        active=turnover.active,
        replaced=turnover.replaced,
        grown=turnover.replaced,
        dropped=turnover.dropped,
        seconds=time.perf_counter() - began,
        cohort_counts=tuning.store.cohort_counts(len(tuning.cohort_steps)),
        cohort_steps=tuning.cohort_steps,
    )


def finite_or_stop(session, metrics, checkpoints, loss: float, grad_norm: float) -> bool:
    """Check loss and gradient; if one is NaN or infinite, skip the step (False) while that is allowed, or end the run.

    Raises:
        UserError: no further step may be skipped; the state before this step has been saved if it is finite.
    """
    tuning, run, config = session.tuning, checkpoints.run, session.inputs.config.run
    if isfinite(loss) and isfinite(grad_norm) and tuning.candidates_are_finite:
        return True
    session.optimizer.discard()
    step, learning_rate = session.step + 1, session.optimizer.learning_rate
    batch = ", ".join(map(str, session.inputs.order.batch(step)))
    what = f"step {step}: the loss is {loss} and the gradient norm {grad_norm} at learning rate {learning_rate:.3g}"
    if not bool(tuning.store.flat.isfinite().all()):
        raise UserError(
            f"{what}; the deltas of step {step - 1} have overflowed and are not saved. Fix: lower learning_rate"
        )
    if len(session.skipped_steps) < config.skip_nonfinite_steps:
        session.skipped_steps.append(step)
        metrics.note(f"{what}; skipped: {len(session.skipped_steps)} of at most {config.skip_nonfinite_steps} steps")
        return False
    session.cluster.on_main(lambda: run.save_adapter(session.adapter()))
    failure = checkpoints.save(metrics) if tuning.is_finite() else "the optimizer state has overflowed"
    saved = f"but for a checkpoint: {failure}" if failure else "and as a checkpoint"
    raise UserError(
        f"{what}; the deltas of step {step - 1} are saved in {run.adapter}, {saved}. The batch was examples {batch} "
        "(counted from 0). Fix: check them, lower learning_rate, set max_grad_norm, or allow skip_nonfinite_steps"
    )


def evaluate_if_due(session, metrics, run) -> None:
    """Evaluate held-out loss before training, after it and every `eval_every_steps`; at both ends exact match too."""
    from scale_sft.training.best import best_step, save_best

    step, every = session.step, session.inputs.config.run.eval_every_steps
    ends = step in (0, session.inputs.steps)
    due = ends or (every and step % every == 0)
    if not due or session.inputs.eval is None or step in session.evaluations:
        return
    began = time.perf_counter()
    with metrics.phase("evaluating"):
        result = session.evaluate(answers=ends)
    session.evaluations[step] = result
    metrics.evaluation(
        step,
        loss=result.loss,
        perplexity=result.perplexity,
        target_tokens=result.target_tokens,
        seconds=time.perf_counter() - began,
        exact_match=result.exact_match,
        **(result.rewards or {}),
    )
    metrics.samples(step, [vars(answer) for answer in session.samples])
    best_by = session.inputs.config.objective.best_by
    if best_step(session.evaluations, best_by) == step and run.keeps_best(session.inputs.config):
        session.cluster.on_main(lambda: save_best(session.adapter(), result.loss, step, run.best))


def measurements(cluster) -> dict[str, int]:
    """Read memory, and the bytes that this rank passed to collectives since the last call."""
    from scale_sft.model.memory import take_peak_bytes

    traffic = {f"comm_{purpose}_bytes": count for purpose, count in cluster.traffic_bytes.items()}
    cluster.traffic_bytes.clear()
    return {"memory_bytes": take_peak_bytes(cluster.device), **traffic}


def run(recipe: str | Path | Config | None = None, /, **options: Any) -> RunResult:
    """Train; this is what `scale_sft.train(...)` and the command line call.

    Args:
        recipe: name of a shipped recipe, path of a YAML file, or a whole `Config`; None: the options alone.
        **options: any option of a recipe by its name; it wins over the recipe.

    Raises:
        UserError: an option, file or model is invalid; the message says what to change.

    Example:
        >>> result = scale_sft.train("demo", steps=20, output_dir="runs/short")
        >>> print(result.before.loss, result.after.loss, result.adapter)
    """
    return run_training(load(recipe, options))


def run_training(config: Config) -> RunResult:
    """Run a configuration from start to end; torch's global settings are what they were afterwards."""
    from scale_sft.model.determinism import deterministic

    with deterministic(config.run.deterministic):  # before anything touches a GPU
        return run_configuration(config)


def run_configuration(config: Config) -> RunResult:
    """Run a configuration: inputs, ranks, model, loop, files."""
    from scale_sft.distributed.cluster import Cluster
    from scale_sft.distributed.world import World, refuse_lonely_launchers
    from scale_sft.training.inputs import read_inputs
    from scale_sft.training.result import RunResult
    from scale_sft.training.run_folder import RunFolder

    refuse_lonely_launchers()
    run = RunFolder(config.run.output_dir)
    if done := run.finished(config):
        if World.from_environment().rank == 0:
            print(done)
        return RunResult.read(run, save_merged=config.run.save_merged)
    run.refuse_if_taken(config)
    interruption = Interruption()
    with interruption.handled():
        inputs = read_inputs(config)
        with Cluster.start(
            sharded=inputs.placement.sharded,
            dtype=inputs.dtype,
            ds_config=config.model.ds_config,
            tracker=config.run.tracker,
            logging_dir=run.path,
            timeout_seconds=config.run.collective_timeout_seconds,
            interruption=interruption,
        ) as cluster:
            return run_on(cluster, inputs, run)


def run_on(cluster, inputs, run) -> RunResult:
    """Run on ranks that have already been started."""
    from scale_sft.training import lifecycle as outcome
    from scale_sft.training.assemble import assemble
    from scale_sft.training.checkpoints import Checkpoints
    from scale_sft.training.result import RunResult

    cluster.on_main(run.lock)
    session = assemble(inputs, cluster)
    checkpoints = Checkpoints(session, run)
    notes = checkpoints.resume() + session.describe_kernels() + session.prove_loss() + session.prove_answers()
    cluster.on_main(lambda: run.claim(inputs.config))
    with outcome.open_metrics(session, run) as metrics:
        outcome.describe(session, metrics)
        for note in notes:
            metrics.note(note)
        with cluster.in_steps():
            try:
                for note in session.prepare(metrics):
                    metrics.note(note)
                train(session, metrics, checkpoints)
            except Interrupted as stop:
                failure = checkpoints.save(metrics)
                if failure:
                    raise UserError(f"{stop}: {failure}") from None
                saved = f"saved after step {session.step} in {run.path}; run the same command again to resume"
                raise Interrupted(f"{stop}: {saved}") from None
        outcome.finish(session, metrics, run)
    return RunResult.of(session, run)


def run_and_exit(recipe: str | None, options: Mapping[str, Any]) -> NoReturn:
    """Train, then end the process: with status 0, or with a one-line error and its status."""
    from scale_sft.distributed.exit import end_process, leave

    try:
        run(recipe, **options)
        end_process()
    except UserError as error:
        leave(str(error))
    except Interrupted as stop:
        leave(str(stop), stop.status, patience_seconds=3)
    except OSError as error:
        leave(f"{explain(error)}. Fix that and run the same command again: it resumes from the last checkpoint")
    except KeyboardInterrupt:
        leave("interrupted", 130, patience_seconds=3)


@click.command(cls=SuggestingCommand, context_settings={"max_content_width": 110})
@with_config_options
def main(recipe: str | None, **options: str | None) -> None:
    r"""Fine-tune a causal language model sparsely: freeze the base, train a few per cent of its weights.

    \b
    accelerate launch scale_sft/train.py --config demo
    accelerate launch --config_file launch/zero3_8gpu.yaml scale_sft/train.py --config RECIPE --density 0.01

    Options come from the recipe; any given here win over it. `scale-sft train` is the same without accelerate's own
    messages.
    """
    run_and_exit(recipe, options)


class _Callable(ModuleType):
    """This module, callable: `scale_sft.train("demo")` next to `from scale_sft.train import main`."""

    def __call__(self, recipe: str | Path | Config | None = None, /, **options: Any) -> RunResult:
        return run(recipe, **options)


_Callable.__call__.__doc__ = run.__doc__
sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
