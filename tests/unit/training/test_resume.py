"""A run goes on from its newest complete checkpoint, or says why it does not."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from scale_sft import train
from scale_sft.config import options as config
from scale_sft.distributed.signals import Interrupted
from scale_sft.errors import UserError
from scale_sft.kernels.cpu.sampled_columns import SampledColumns
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.spiel.schedules import Phase
from tests.faults.comparing import losses


class Crash(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def crashing_run(train_run, monkeypatch):
    """(step, option=value, ...): a run that ends in the middle of `step`."""

    def run(step, **options):
        original = train.forward_backward

        def crashing(session, batch):
            if session.step + 1 == step:
                raise Crash
            return original(session, batch)

        with monkeypatch.context() as patch:
            patch.setattr(train, "forward_backward", crashing)
            with pytest.raises(Crash):
                train_run(**options)

    return run


@pytest.fixture
def saving(tmp_path):
    """Options: a checkpoint after every second step, every step on record."""
    return {"output_dir": str(tmp_path / "run"), "save_every_steps": 2, "keep_last": 9, "log_every_steps": 1}


def steps_of(run, event="step"):
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["event"] == event]


def checkpoint(tmp_path, step):
    return tmp_path / "run" / "checkpoints" / f"step_{step:06d}"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


LEAN = {"moments": "int8", "gradient_dtype": "bfloat16", "delta_dtype": "bfloat16"}
SAMPLED = {"selection_batches": 2, "score": "balanced", "draw": "sample", "temperature": 0.5}
OPTIONS = {
    "plain": {},
    "lean": LEAN,
    "mixed": {"moments": "mixed"},
    "sampled growth": SAMPLED,
    "static, with a quota": SAMPLED | {"method": "static", "row_quota": 2.0},
    "global ranking": {"method": "static", "selection_batches": 1, "budget": "global"},
    "random": {"method": "random"},
    "columns": {"method": "columns"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_leaves_the_same_bits_and_each_step_once(options, train_run, crashing_run, saving, tmp_path):
    saving = saving | options
    whole = train_run(**{**saving, "output_dir": str(tmp_path / "whole")})
    crashing_run(6, **saving)
    run = train_run(**saving)
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert losses(run) == losses(whole)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_resumed_run_samples_columns_where_the_whole_one_did(
    method, c_kernels, train_run, crashing_run, saving, tmp_path, monkeypatch
):
    """bfloat16: a gradient formed whole is rounded, sampled entries of it are not."""
    sampled = []
    monkeypatch.setattr(SampledColumns, "pays", lambda *_: sampled.append(1) or True)
    saving = saving | {"method": method, "dtype": "bfloat16", "micro_batch_size": 2, "update_interval_steps": 3}
    whole = train_run(**{**saving, "estimation_steps": 2, "output_dir": str(tmp_path / "whole")})
    assert sampled
    crashing_run(6, **saving, estimation_steps=2)
    run = train_run(**saving, estimation_steps=2)
    assert losses(run) == losses(whole)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_is_small_and_holds_nothing_of_the_base(train_run, saving, tmp_path):
    train_run(**saving, density=0.2)
    from safetensors import safe_open

    manifest = json.loads((checkpoint(tmp_path, 6) / "manifest.json").read_text())
    with safe_open(checkpoint(tmp_path, 6) / "tensors_00001.safetensors", "pt") as file:
        kinds = {key.rpartition("/")[2] for key in file.keys()}  # noqa: SIM118
        size = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert kinds == {"indices", "deltas", "cohort", "exp_avg", "exp_avg_sq"}
    assert size == 17 * manifest["active_entries"]


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_run_that_never_saved_starts_afresh_and_says_so(stop_at, train_run, crashing_run, saving, capsys):
    crashing_run(stop_at, **saving)
    run = train_run(**saving)
    assert "no checkpoint: starting from step 0" in capsys.readouterr().out
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]


def test_another_run_that_never_saved_is_not_overwritten(train_run, crashing_run, saving):
    crashing_run(2, **saving)
    with pytest.raises(UserError, match="already holds a run .* that differs in seed"):
        train_run(**saving, seed=5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train_run, crashing_run, saving, tmp_path, capsys):
    crashing_run(5, **saving)
    flip(checkpoint(tmp_path, 4) / "tensors_00001.safetensors")
    run = train_run(**saving)
    shown = capsys.readouterr().out.replace("\n", "")
    assert "passed over a damaged checkpoint" in shown and "its checksum is not that of the manifest" in shown
    assert "2 of 6 steps are done" in shown
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]


def test_with_no_complete_checkpoint_there_is_an_error_and_no_fresh_start(train_run, crashing_run, saving, tmp_path):
    crashing_run(5, **saving)
    (checkpoint(tmp_path, 4) / "manifest.json").unlink()
    for file in checkpoint(tmp_path, 2).iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no complete checkpoint") as raised:
        train_run(**saving)
    assert "manifest.json is missing" in str(raised.value) and "step_000002 is empty" in str(raised.value)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="has saved checkpoints, but .* holds none"):
        train_run(**saving)


def test_resume_never_refuses_a_folder_that_holds_a_run(train_run, crashing_run, saving):
    crashing_run(5, **saving)
    with pytest.raises(UserError, match="already holds a run .* resume is never"):
        train_run(**saving, resume="never")


def test_a_finished_run_started_again_by_the_same_command_says_so_and_does_nothing(
    train_run, saving, monkeypatch, capsys
):
    run = train_run(**saving)
    before = contents(run)
    capsys.readouterr()
    monkeypatch.setattr("scale_sft.training.inputs.read_inputs", lambda *_: pytest.fail("it began again"))
    train_run(**saving, eval_batch_size=2)  # of no effect on the result
    assert capsys.readouterr().out == f"finished already at step 6, adapter in {run / 'adapter'}\n"
    monkeypatch.setenv("RANK", "1")
    train_run(**saving)
    assert capsys.readouterr().out == "" and contents(run) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 5}, "that is finished and differs in seed"),
        ({"density": 0.06}, "that is finished and differs in density"),
        ({"steps": 8}, r"differs in steps \(a run of another length is a new run"),
        ({"save_merged": True}, r"without a merged model \(scale-sft merge .*/adapter .*/merged writes it\)"),
        ({"resume": "never"}, "and resume is never"),
    ],
)
def test_a_finished_run_is_not_mistaken_for_another(changed, said, train_run, saving):
    before = contents(train_run(**saving))
    with pytest.raises(UserError, match=said):
        train_run(**{**saving, **changed})
    assert contents(Path(saving["output_dir"])) == before


def test_a_resumed_run_tells_the_loss_before_training_as_a_whole_run_does(
    train_run, crashing_run, saving, pairs_file, tmp_path, capsys
):
    options = {**saving, "eval_data": str(pairs_file)}
    told = []
    for crash in (None, 5):
        options["output_dir"] = str(tmp_path / f"run{crash}")
        if crash:
            crashing_run(crash, **options)
        capsys.readouterr()
        train_run(**options)
        said = capsys.readouterr().out
        told.append(re.findall(r"held-out loss +(\S+) (?:->|before,) (\S+)", said))
    assert told[0] == told[1] and len(set(told[0])) == 1 and len(told[0]) == 2


def test_resume_takes_a_chosen_checkpoint_into_a_new_folder(train_run, crashing_run, saving, tmp_path):
    whole = train_run(**{**saving, "output_dir": str(tmp_path / "whole")})
    run = train_run(
        **{**saving, "output_dir": str(tmp_path / "branch")}, resume=str(whole / "checkpoints" / "step_000002")
    )
    assert steps_of(run) == [3, 4, 5, 6]
    assert losses(run) == losses(whole)[2:]
    with pytest.raises(UserError, match="holds no checkpoint"):
        train_run(**{**saving, "output_dir": str(tmp_path / "other")}, resume=str(tmp_path))


def test_a_rate_that_follows_the_budget_is_told_and_holds_when_a_run_resumes(
    train_run, crashing_run, saving, tmp_path, capsys
):
    """The description, the checkpoint and the card have the number, whether or not it is repeated."""
    saving |= {"density": None, "rank_equivalent": 4, "learning_rate": None}
    crashing_run(4, **saving)
    shown = " ".join(capsys.readouterr().out.split())
    assert "learning rate 0.0018 at its peak (for as many entries as LoRA of rank 4 has parameters)" in shown
    with pytest.raises(UserError, match=r"peak learning rate: 0.0018 in the checkpoint, 0.01 now"):
        train_run(**saving | {"learning_rate": 0.01})
    run = train_run(**saving | {"learning_rate": 0.0018})
    assert train_run(**saving | {"output_dir": str(tmp_path / "whole"), "save_every_steps": None}) != run
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert "| learning_rate | 0.0018 |" in card
    assert losses(run) == losses(tmp_path / "whole")


def test_resuming_another_run_is_refused_with_what_differs(
    train_run, crashing_run, saving, tmp_path, tiny_model, pairs_file
):
    crashing_run(5, **saving)
    other_base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), other_base)
    from safetensors.torch import load_file, save_file

    weights = load_file(other_base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, other_base / "model.safetensors", metadata={"format": "pt"})
    other_data = tmp_path / "other.jsonl"
    other_data.write_text(pairs_file.read_text().replace("0 = ", "0 == "))
    others = {
        "hash of the target weights": {"base": str(other_base)},
        "target weights": {"density": 0.06},
        "target weights ": {"target_modules": "q_proj"},
        "method: ag in the checkpoint, static now": {"method": "static"},
        "seed: 0 in the checkpoint, 1 now": {"seed": 1},
        "global_batch_size: 4 in the checkpoint, 8 now": {"global_batch_size": 8},
        "train_data": {"train_data": str(other_data)},
        "total steps: 6 in the checkpoint, 7 now": {"steps": 7},
    }
    before = sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("step_*/*"))
    for message, changed in others.items():
        with pytest.raises(UserError, match=message.strip()) as raised:
            train_run(**{**saving, **changed})
        said = str(raised.value)
        assert "is of another run" in said and ("a run of another length is a new run" in said) == ("steps" in changed)
        free = said.partition("What may change: ")[2].split(", ")
        assert {"answer_pattern", "base_placement"} <= {*free} and not {"steps", "density", "base"} & {*free}
    assert before == sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("step_*/*"))


def test_what_may_change_is_accepted(train_run, crashing_run, saving, tmp_path, tiny_model):
    crashing_run(5, **saving, kernels="cpu")  # without a GPU the same as the default
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model("llama"), moved)
    changed = {"save_every_steps": 3, "keep_last": 1, "log_every_steps": 2, "base": str(moved), "micro_batch_size": 2}
    run = train_run(**{**saving, **changed}, on_save_failure="continue", tracker=None, eval_batch_size=2)
    assert steps_of(run)[-1] == 6


def test_options_that_may_change_exist():
    assert set(config.OPTIONS) >= config.MAY_CHANGE


# --- steps without a finite loss ----------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """(steps): from now on the loss of these steps is NaN."""

    def poison(*steps):
        original = train.forward_backward

        def forward_backward(session, batch):
            loss, tokens = original(session, batch)
            if session.step + 1 in steps:
                session.tuning.recorder.flat.fill_(torch.nan)
                if session.tuning.recorder.phase is Phase.PROPOSE:  # chosen by what is no number
                    for candidates in session.tuning.recorder.candidates.values():
                        candidates.indices.zero_()
                return float("nan"), tokens
            return loss, tokens

        monkeypatch.setattr(train, "forward_backward", forward_backward)

    return poison


def test_a_loss_that_is_no_number_stops_the_run_with_its_state_saved(train_run, saving, poisoned, tmp_path):
    poisoned(4)
    with pytest.raises(UserError) as raised:
        train_run(**saving)
    message = str(raised.value)
    assert "step 4: the loss is nan" in message and "learning rate 0.00" in message and "counted from 0" in message
    assert "the deltas of step 3 are saved in" in message and "and as a checkpoint" in message
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_the_state_saved_before_a_bad_step_is_that_of_an_undisturbed_run(
    train_run, saving, poisoned, tmp_path, monkeypatch
):
    whole = train_run(**{**saving, "output_dir": str(tmp_path / "whole")})
    for bad in (3, 4):  # the step that proposes candidates, and the one after it
        run = tmp_path / f"bad{bad}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "forward_backward", train.forward_backward)
            poisoned(bad)
            with pytest.raises(UserError, match="no number|nan"):
                train_run(**{**saving, "output_dir": str(run)})
        monkeypatch.undo()
        from scale_sft.training import lifecycle as outcome

        monkeypatch.setattr(outcome, "write_report", lambda folder: folder)
        train_run(**{**saving, "output_dir": str(run)})
        assert losses(run) == losses(whole)


@pytest.mark.parametrize("bad", [(1,), (2,), (3,), (4,), (1, 2)])
def test_a_few_bad_steps_can_be_left_out(bad, train_run, saving, poisoned):
    poisoned(*bad)
    run = train_run(**saving, skip_nonfinite_steps=2)
    assert steps_of(run) == [step for step in range(1, 7) if step not in bad]


def test_the_limit_of_left_out_steps_holds_over_a_resume(train_run, crashing_run, saving, poisoned):
    poisoned(2, 3, 5)
    crashing_run(5, **saving, skip_nonfinite_steps=2)
    with pytest.raises(UserError, match="step 5: the loss is nan"):
        train_run(**saving, skip_nonfinite_steps=2)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_a_signal_saves_and_stops_and_the_run_goes_on(
    number, moment, train_run, saving, tmp_path, pairs_file, monkeypatch
):
    options = {**saving, "eval_data": str(pairs_file), "eval_every_steps": 3, "save_every_steps": None}
    whole = train_run(**{**options, "output_dir": str(tmp_path / "whole")})
    from scale_sft.model import loss

    owner = train if moment == "step" else loss
    name = "forward_backward" if moment == "step" else "token_loss_sum"
    original, calls = getattr(owner, name), []

    def signalling(*arguments):
        calls.append(name)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(*arguments)

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalling)
        with pytest.raises(Interrupted, match=f"{number.name}: saved after step"):
            train_run(**options)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    run = train_run(**options)
    assert losses(run) == losses(whole)
    assert steps_of(run, "eval") == steps_of(whole, "eval") == [0, 3, 6]


# --- disk full, two owners ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_save_failure", ["stop", "continue"])
def test_when_a_checkpoint_cannot_be_written(on_save_failure, train_run, saving, tmp_path, monkeypatch, capsys):
    from scale_sft.training import checkpoint_files

    original = checkpoint_files.save_file

    def full(tensors, path, **named):
        if "step_000004" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, **named)

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    if on_save_failure == "stop":
        with pytest.raises(UserError, match="No space left on device"):
            train_run(**saving, on_save_failure=on_save_failure)
        left = ["step_000002"]
    else:
        train_run(**saving, on_save_failure=on_save_failure)
        assert "warning: step 4: checkpoint" in capsys.readouterr().out
        left = ["step_000002", "step_000006"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == left
