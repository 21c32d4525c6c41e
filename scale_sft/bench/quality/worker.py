"""Do one run of `bench quality`: train, then evaluate. It imports `train`, as only entry points and `bench.gpu` do."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scale_sft.errors import UserError

from .contestants import Contestant
from .intervals import PARTS
from .tasks import Retained, retained_examples
from .updates import Update, dense_updates, figures, peft_updates, sparse_updates

CURVE_POINTS = 40


@dataclass(frozen=True)
class Job:
    """One run: contestant, rate, seed, and the settings that all runs share."""

    contestant: Contestant
    learning_rate: float | None  # None: nothing is trained
    seed: int
    recipe: str | None
    options: Mapping[str, Any]  # of the configuration
    validation_examples: int
    retained: Sequence[Retained] = ()
    task: str = ""  # its name

    def config(self) -> Any:
        """Build the run's configuration.

        Raises:
            ConfigError: a variant has invalid options.
        """
        from scale_sft.config.loading import load

        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        own = {
            "seed": self.seed,
            "save_every_steps": "none",
            "early_stopping_steps": "none",
            "skip_nonfinite_steps": 0,
            "base_placement": "replicate",
        }
        return load(self.recipe, {**self.options, **own, **rate, **self.contestant.options})


@dataclass
class Progress:
    """The record of a training loop: its loss, as means over windows of steps, and its memory."""

    steps: int
    curve: list[list[float]] = field(default_factory=list)  # [last step of a window, its mean loss]
    peak_bytes: int = 0
    _window: list[float] = field(default_factory=list)

    def step(self, step: int, loss: float, memory_bytes: int = 0, **_: Any) -> None:
        self._window.append(loss)
        self.peak_bytes = max(self.peak_bytes, memory_bytes)
        if step % max(1, self.steps // CURVE_POINTS) == 0 or step == self.steps:
            self.curve.append([step, sum(self._window) / len(self._window)])
            self._window.clear()


def run_job(job: Job) -> dict[str, Any]:
    """Train and evaluate; returns the results as JSON. A run that diverges is a result too: {"failed": why}.

    Losses are means over target tokens in nats; `validation_loss` is on examples kept out of the training data,
    `held_out_loss` and `exact_match` (a fraction) are on `eval_data`, `retained` holds the losses on other data by
    name; `held_out_parts` and `retained_parts` hold the parts of these losses (see `loss_in_parts`). `seconds` is the
    loop alone, with the choice of entries; `peak_bytes` is the peak memory of training above the base's weights. For
    the figures of the update see `updates.figures`.
    """
    from scale_sft.distributed.cluster import Cluster
    from scale_sft.training.inputs import read_inputs

    _give_memory_back()
    inputs, validation = split(read_inputs(job.config()), job.validation_examples)
    with Cluster.start(sharded=False, dtype=inputs.dtype) as cluster:
        try:
            trained, result = train_one(job.contestant, replace(inputs, eval=None), cluster)
            result |= evaluated(trained.model, inputs, validation, cluster)
            result |= _retained(trained.model, job.retained, inputs, cluster)
            if trained.updates is not None:
                result |= figures(trained.updates())
        except UserError as error:
            return {"failed": str(error).split(";")[0]}
    losses = result["validation_loss"], result["held_out_loss"]
    return result if all(map(math.isfinite, losses)) else {"failed": f"the losses after training are {losses}"}


def split(inputs: Any, count: int) -> tuple[Any, Any]:
    """Split `count` training examples off the inputs: the same ones for every contestant, rate and seed.

    Raises:
        UserError: there are too few examples, or nothing is held out.
    """
    import torch

    from scale_sft.spiel.seeding import seeded_generator

    total = len(inputs.train)
    if inputs.eval is None:
        raise UserError("eval_data: got none, expected held-out examples to report on. Fix: name some")
    if not 0 < count < total:
        raise UserError(f"--validation_examples: got {count}, but the training data are {total} examples")
    order = torch.randperm(total, generator=seeded_generator(0, "validation split")).tolist()
    train = inputs.train.subset(sorted(order[count:]))
    left = replace(inputs, train=train, order=replace(inputs.order, examples=len(train)))
    return left, inputs.train.subset(sorted(order[:count]))


@dataclass(frozen=True)
class Trained:
    """A model after training."""

    model: Any
    trainable: int  # weights
    seconds: float | None  # None: nothing was trained
    updates: Callable[[], Iterator[Update]] | None  # what training has changed; None: nothing


def train_one(contestant: Contestant, inputs: Any, cluster: Any) -> tuple[Trained, dict[str, Any]]:
    """Train; returns the model and the figures of its training.

    Raises:
        UserError: the run diverges, or the base cannot be trained in this way.
    """
    from scale_sft.model.memory import PeakMemory, memory_bytes, take_peak_bytes

    take_peak_bytes(cluster.device)
    progress, before = Progress(inputs.steps), memory_bytes(cluster.device)
    with PeakMemory(cluster.device) as peak:
        trained = _WAYS[contestant.kind](contestant.kind, inputs, cluster, progress)
    if trained.seconds is None:
        return trained, {"trainable": 0}
    tokens = sum(inputs.train.all_tokens(inputs.order.batch(step)) for step in range(1, inputs.steps + 1))
    # each of our steps reports and resets a GPU's peak; on a CPU its figure adds nothing to the samples
    added = max(peak.added, progress.peak_bytes - before)
    return trained, {
        "trainable": trained.trainable,
        "seconds": trained.seconds,
        "tokens_per_second": tokens / trained.seconds,
        "peak_bytes": max(0, added - _base_bytes(trained.model)),
        "curve": progress.curve,
    }


def _train_ours(kind: str, inputs: Any, cluster: Any, progress: Progress) -> Trained:
    """Train through `train.train`, as in a run, with its files in a temporary folder."""
    from scale_sft.reporting.metrics import NullMetrics
    from scale_sft.train import train
    from scale_sft.training.assemble import assemble
    from scale_sft.training.checkpoints import Checkpoints
    from scale_sft.training.run_folder import RunFolder

    class Metrics(NullMetrics):
        def step(self, step: int, **values: Any) -> None:
            progress.step(step, **values)

    session = assemble(inputs, cluster)
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        train(session, Metrics(), Checkpoints(session, RunFolder(Path(folder) / "run")))
        seconds = time.perf_counter() - began
    return Trained(session.model, session.tuning.store.active, seconds, partial(sparse_updates, session.sparse))


def _train_peer(kind: str, inputs: Any, cluster: Any, progress: Progress) -> Trained:
    from scale_sft.model.loading import load_base

    from .peers import build, train_peer

    model, weights = build(kind, inputs, cluster)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    began = time.perf_counter()
    train_peer(model, weights, inputs, cluster, progress.step)
    seconds = time.perf_counter() - began
    config, trainable = inputs.config.model, sum(weight.numel() for weight in weights)
    base = partial(load_base, config, inputs.model_config, cluster.device, inputs.quantization)
    updates = partial(dense_updates, model, names, base) if kind == "full" else partial(peft_updates, model)
    return Trained(model, trainable, seconds, updates)


def _train_nothing(kind: str, inputs: Any, cluster: Any, progress: Progress) -> Trained:
    from scale_sft.model.loading import load_base

    model = load_base(inputs.config.model, inputs.model_config, cluster.device, inputs.quantization)
    return Trained(model, 0, None, None)


_WAYS: dict[str, Callable[..., Trained]] = {
    "base": _train_nothing, "ours": _train_ours, "peft-lora": _train_peer, "peft-lora-rs": _train_peer,
    "peft-ia3": _train_peer, "full": _train_peer,
}  # fmt: skip


def loss_on(model: Any, examples: Any, inputs: Any, cluster: Any) -> float:
    """Compute the mean loss per target token."""
    return loss_in_parts(model, examples, inputs, cluster)[0]


def _retained(model: Any, retained: Sequence[Retained], inputs: Any, cluster: Any) -> dict[str, dict[str, Any]]:
    """Measure the loss on each of the data that the model should still know; empty without any."""
    found = {one.name: loss_in_parts(model, retained_examples(one, inputs), inputs, cluster) for one in retained}
    losses = {name: loss for name, (loss, _) in found.items()}
    return {"retained": losses, "retained_parts": {name: parts for name, (_, parts) in found.items()}} if found else {}


def loss_in_parts(model: Any, examples: Any, inputs: Any, cluster: Any) -> tuple[float, list[list[float]]]:
    """Compute the mean loss per target token, and of at most PARTS parts of the examples their sums and tokens."""
    from scale_sft.evaluation.held_out import loss_by_example

    size, pad = inputs.config.run.eval_batch_size, inputs.tokenizer.pad_token_id
    losses = loss_by_example(model, examples, cluster, size, pad)
    members = [range(n, len(examples), PARTS) for n in range(min(PARTS, len(examples)))]
    parts = [[round(sum(losses[n] for n in part), 6), examples.target_tokens(part)] for part in members]
    return sum(losses) / examples.target_tokens(range(len(examples))), parts


def evaluated(model: Any, inputs: Any, validation: Any, cluster: Any) -> dict[str, Any]:
    """Measure losses on both held-out parts, and exact match on the second if the configuration requests it."""
    from scale_sft.evaluation.answers import exact_match, greedy_answers

    config = inputs.config
    size, count = config.run.eval_batch_size, config.data.exact_match_examples
    loss, parts = loss_in_parts(model, inputs.eval, inputs, cluster)
    result: dict[str, Any] = {
        "validation_loss": loss_on(model, validation, inputs, cluster),
        "held_out_loss": loss,
        "held_out_parts": parts,
    }
    if count:
        answers = greedy_answers(
            model,
            inputs.tokenizer,
            inputs.eval,
            cluster,
            count=count,
            batch_size=size,
            max_new_tokens=config.data.max_new_tokens,
        )
        result["exact_match"] = exact_match(answers, config.data.answer_pattern)
    return result


def _base_bytes(model: Any) -> int:
    """Count the bytes of frozen weights and of those trained in place, not of an adapter's."""
    weights = ((name, weight) for name, weight in model.named_parameters())
    return sum(weight.nbytes for name, weight in weights if "lora_" not in name and "ia3_" not in name)


def _give_memory_back() -> None:
    """Return memory freed by earlier runs to the system, so that it does not count in the next peak."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library: peaks may come out smaller
        ctypes.CDLL("libc.so.6").malloc_trim(0)
