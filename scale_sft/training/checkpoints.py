"""Save and resume a run: all that the next step needs, bit for bit, and nothing of the base.

The state is the same on every rank, so the main rank writes it and shares what it reads. A run may resume on another
number of ranks and with another placement of the base. Data order and initial indices depend only on seed and step; no
global random state is used. File format: `checkpoint_files`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scale_sft.config.options import FREE, MAY_CHANGE
from scale_sft.errors import UserError
from scale_sft.evaluation.held_out import Evaluation

from .checkpoint_files import (
    STATE,
    Checkpoint,
    Damaged,
    SaveFailed,
    TensorFiles,
    find_checkpoints,
    prune,
    read_json,
    sweep,
    verify,
    write_checkpoint,
)
from .reference_adapter import REFERENCE_DIGEST
from .run_folder import NEW_LENGTH, RunFolder
from .starting import START_DIGEST, TARGETS

if TYPE_CHECKING:
    from .session import Session

_STATE_KEYS = {
    "step",
    "identity",
    "options",
    "counters",
    "evaluations",
    "skipped_steps",
    "ranks",
    "proposal_sequences",
}
_FORMER_KEYS = {"gradient_paths"}
"""What earlier versions saved and this one has no use for: a choice among kernels that are gone."""

_BEFORE = {
    "score": "gradient",
    "draw": "top",
    "temperature": 1.0,
    "selection_batches": 0,
    "selection_pool": None,
    "granularity": "auto",
    "block_size": 16,
    "budget": "weight",
    "budget_floor": 0.1,
    "compile": "off",
    "deterministic": False,
    "exchange_if_better": False,
    "seed_moments": True,
    "growth_warmup_steps": 0,
    "rate_scaling": "none",
}
"""What runs did before these options existed. Not their defaults, which may change."""
_PEAK, _WARMUP = "peak learning rate", "warm-up steps"
"""Keys of a checkpoint's identity: what learning_rate and warmup_fraction lead to. Earlier versions recorded them."""


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks."""

    def __init__(self, session: Session, run: RunFolder):
        self.session, self.run = session, run
        self._saved_step: int | None = None
        self._files: TensorFiles | None = None  # of the checkpoint to resume from; on the main rank

    # --- resume -------------------------------------------------------------------------------------------------

    def resume(self) -> list[str]:
        """Bring the session to the state of the checkpoint that it resumes from; returns notes for the user.

        Raises:
            UserError: there are checkpoints but none is complete, or the checkpoint is of another run.
        """
        session = self.session
        notes, state, layout = session.cluster.on_main(self._read)
        if state is None:
            start = session.inputs.start
            if start and start.info is None:
                raise UserError(f"start_from: {start.folder} is gone, and so are the checkpoints. Fix: put one back")
            return notes
        session.optimizer.resume(state["step"], self._shared(layout), state["counters"])
        self._files = None
        self._saved_step = state["step"]
        session.skipped_steps = state["skipped_steps"]
        session.evaluations = {entry.pop("step"): Evaluation(**entry) for entry in state["evaluations"]}
        session.cluster.check_identical(session.tuning.digests, f"the state that was loaded for step {session.step}")
        return notes

    def _read(self) -> tuple[list[str], dict[str, Any] | None, dict[str, dict[str, tuple]]]:
        """Choose a checkpoint on the main rank, and check all of it before anything is touched."""
        sweep(self.run.checkpoints)
        checkpoint, notes = choose_checkpoint(self.run, self.session.inputs.config.run.resume)
        if checkpoint is None:
            return notes, None, {}
        files = TensorFiles(checkpoint)
        state = _checked_state(checkpoint)
        differences = differing(*map(self._comparable, (state["identity"], self._identity())))
        if differences:
            raise UserError(
                f"resume: {checkpoint.path} is of another run; it differs in:\n  "
                + "\n  ".join(differences)
                + "\nFix: use the same, or another output_dir"
                + NEW_LENGTH * (state["identity"].get("total steps") != self.session.inputs.steps)
                + f". What may change: {', '.join(sorted(FREE))}"
            )
        layout = self._checked_layout(checkpoint, files, state)
        self._files = files
        notes.append(f"resumed from {checkpoint.path}: {state['step']} of {self.session.inputs.steps} steps are done")
        now = _proposal_sequences(self.session)
        if state["ranks"] != self.session.cluster.size:
            notes.append(f"saved on {_ranks(state['ranks'])}; resuming on {self.session.cluster.size}")
        if state["proposal_sequences"] != now:
            notes.append(
                f"candidates are proposed by {now} sequences, until now by {state['proposal_sequences']}; "
                f"--proposal_batch_size {state['proposal_sequences']} keeps that number on any number of ranks"
            )
        return notes, state, layout

    def _checked_layout(
        self, checkpoint: Checkpoint, files: TensorFiles, state: Mapping
    ) -> dict[str, dict[str, tuple]]:
        """Check that the method can resume from all tensors; returns their (shape, dtype) by weight and kind."""
        tuning = self.session.tuning
        if set(files.kinds) != set(tuning.store.names):
            raise Damaged(f"{checkpoint.path}: its tensors are not those of the weights it names")
        own = tuning.counters()
        cohorts = len(state["counters"].get("cohort_steps", []))
        due = [0] + [step for step in tuning.schedule.reallocations() if step <= state["step"]]
        if set(state["counters"]) != set(own) or any(len(counts) != cohorts for counts in state["counters"].values()):
            raise Damaged(f"{checkpoint.path / STATE}: its counters are {sorted(state['counters'])}")
        if cohorts == 0 or not set(state["counters"]["cohort_steps"]) <= set(due):
            raise Damaged(f"{checkpoint.path / STATE}: its reallocations are not those of the schedule")
        layout = {}
        for name in tuning.store.names:
            tensors = files.read(name)
            wrong = tuning.wrong_with_state(name, tensors, state["step"], cohorts)
            if wrong:
                raise Damaged(f"{checkpoint.path}: weight '{name}': {wrong}")
            layout[name] = {kind: (tuple(tensor.shape), tensor.dtype) for kind, tensor in tensors.items()}
        return layout

    def _shared(self, layout: Mapping[str, Mapping[str, tuple]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Share (name, tensors) of each weight with every rank, one weight at a time."""
        for name, kinds in layout.items():
            yield name, self.session.cluster.share(kinds, self._files.read(name) if self._files else {})

    # --- save ---------------------------------------------------------------------------------------------------

    def save_if_due(self, metrics: Any) -> None:
        """Save after every `save_every_steps` steps and after the last.

        Raises:
            UserError: saving failed, and `on_save_failure` is stop; or see `save`.
        """
        step, every = self.session.step, self.session.inputs.config.run.save_every_steps
        if every and (step % every == 0 or step == self.session.inputs.steps):
            failure = self.save(metrics)
            if failure and self.session.inputs.config.run.on_save_failure == "stop":
                raise UserError(failure)

    def save(self, metrics: Any) -> str | None:
        """Save the state after the session's step, unless it is saved already; returns why that failed, or None.

        Raises:
            UserError: the ranks' states differ, or hold NaN or infinity.
        """
        session, step = self.session, self.session.step
        if self._saved_step == step:
            return None
        if not session.tuning.is_finite():
            raise UserError(f"step {step}: the deltas have overflowed and are not saved. Fix: lower learning_rate")
        began = time.perf_counter()
        session.cluster.check_identical(session.tuning.digests, f"the state after step {step}")
        size, failure = session.cluster.on_main(self._write)
        if failure:
            metrics.note(f"warning: step {step}: {failure}")
            return failure
        self._saved_step = step
        metrics.checkpoint(step, bytes=size, active=session.tuning.store.active, seconds=time.perf_counter() - began)
        return None

    def _write(self) -> tuple[int, str | None]:
        """Write on the main rank, then remove what is too old; returns the size in bytes, or what went wrong."""
        session = self.session
        tuning, config = session.tuning, session.inputs.config
        state = {
            "step": session.step,
            "identity": self._identity(),
            "options": dataclasses.asdict(config),
            "counters": tuning.counters(),
            "evaluations": [{"step": step, **e.record()} for step, e in session.evaluations.items()],
            "skipped_steps": session.skipped_steps,
            "ranks": session.cluster.size,
            "proposal_sequences": _proposal_sequences(session),
        }
        weights = ((name, tuning.state_of(name)) for name in tuning.store.names)
        try:
            saved = write_checkpoint(self.run.checkpoints, session.step, weights, state, tuning.store.active)
            prune(self.run.checkpoints, config.run.keep_last)
        except (SaveFailed, OSError) as error:
            return 0, str(error)
        return saved.bytes, None

    def _comparable(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        """Bring what an older version recorded to today's form; take `cpu` and `auto` as one where there is no GPU."""
        identity = dict(identity)
        if "learning_rate" in identity:
            identity[_PEAK] = identity.pop("learning_rate")
            identity[_WARMUP] = math.ceil(identity.pop("warmup_fraction") * identity["total steps"])
        alike = self.session.cluster.device.type == "cpu" and identity.get("kernels") == "auto"
        return {**_BEFORE, **identity, **({"kernels": "cpu"} if alike else {})}

    def _identity(self) -> dict[str, Any]:
        """Collect what a run must have in common with a checkpoint to resume from it, as plain JSON."""
        session = self.session
        inputs, store = session.inputs, session.tuning.store
        sections = dataclasses.asdict(inputs.config)
        if not inputs.config.objective.is_preference:  # checkpoints from before there were preferences stay usable
            del sections["objective"]
        named = (item for section in sections.values() for item in section.items())
        identity = {name: value for name, value in named if name not in MAY_CHANGE}
        identity |= {
            "attention": inputs.attention.name,
            "hash of the target weights": session.base_hash,
            "train_data (digest of its tokens)": inputs.train.digest(),
            "eval_data (digest of its tokens)": inputs.eval.digest() if inputs.eval else None,
            "total steps": inputs.steps,
            _PEAK: session.sparse.learning_rates.peak,
            _WARMUP: session.sparse.learning_rates.warmup_steps,
            START_DIGEST: inputs.start.digest if inputs.start else None,
            **({REFERENCE_DIGEST: inputs.reference.digest} if inputs.reference else {}),
            TARGETS: {delta.name: [*delta.shape, delta.active] for delta in store},
        }
        return json.loads(json.dumps(identity))


def choose_checkpoint(run: RunFolder, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """Choose the checkpoint to resume from, verified; returns it with notes for the user. None: start from step 0.

    Raises:
        UserError: there are checkpoints, but none is complete; or `resume` names a folder without any.
    """
    if resume == "never":
        return None, []
    folder = run.checkpoints_of(resume)
    if folder.name.startswith("step_"):
        return verify(folder), []
    notes: list[str] = []
    for found in find_checkpoints(folder):
        try:
            return verify(found.path), notes
        except Damaged as problem:
            notes.append(f"passed over a damaged checkpoint: {problem}")
    if notes:
        raise UserError(f"resume: {folder} holds no complete checkpoint:\n  " + "\n  ".join(notes) + f"\n{_AFRESH}")
    if resume != "auto":
        raise UserError(f"resume: {folder} holds no checkpoint; expected a folder step_... or the folder of a run")
    if run.has_record("checkpoint"):
        raise UserError(f"resume: the run in {run.path} has saved checkpoints, but {folder} holds none. {_AFRESH}")
    return None, ["no checkpoint: starting from step 0"] if run.is_used() else []


_AFRESH = "Fix: put one back, or start over in another output_dir."


def differing(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each difference between two identities in one line."""
    lines = []
    for key in sorted({*stored, *now}):
        old, new = stored.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
            old, new = (f"'{name}' {side.get(name, 'absent')} of {len(side)}" for side in (old, new))
            key += " [rows, columns, active entries]"
        lines.append(f"{key}: {old} in the checkpoint, {new} now")
    return lines


def _checked_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the JSON state of a verified checkpoint, every field of its type.

    Raises:
        Damaged: it is not what this version writes.
    """
    file = checkpoint.path / STATE
    state = read_json(file)
    if wrong := (set(state) - _FORMER_KEYS) ^ _STATE_KEYS:
        raise Damaged(f"{file}: unexpected or missing: {', '.join(sorted(wrong))}")
    fields = {field.name for field in dataclasses.fields(Evaluation)} | {"step"}
    whole = lambda value: type(value) is int and value >= 0
    try:
        right = (
            state["step"] == checkpoint.step
            and isinstance(state["identity"], dict)
            and all(isinstance(counts, list) and all(map(whole, counts)) for counts in state["counters"].values())
            and all(set(entry) | {"rewards"} == fields and whole(entry["step"]) for entry in state["evaluations"])
            and all(isinstance(entry["loss"], float) for entry in state["evaluations"])
            and all(isinstance(entry.get("rewards", {}), dict) for entry in state["evaluations"])
            and all(map(whole, state["skipped_steps"]))
            and whole(state["ranks"])
        )
    except (TypeError, AttributeError) as error:
        raise Damaged(f"{file} is damaged: {error}") from None
    if not right:
        raise Damaged(f"{file} is damaged: a field has another type")
    return state


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _proposal_sequences(session: Session) -> int:
    """Count the sequences of the global batch that propose candidates."""
    config = session.inputs.config
    micro = config.run.micro_batch_size
    everything = config.run.global_batch_size
    first = min(everything, session.cluster.size * micro) if micro else everything
    return config.sparse.proposal_batch_size or first
