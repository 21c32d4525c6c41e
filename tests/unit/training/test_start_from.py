"""A run that starts from a finished adapter: the model of step 0 is base + adapter, and the rest is a new run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scale_sft
from scale_sft import train
from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.config.loading import load
from scale_sft.errors import UserError
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.reporting.records import load_run, overview
from scale_sft.training import assemble

FILE = "adapter_model.safetensors"
METHODS = ("ag", "ma", "static")


@pytest.fixture
def first(train_run, tmp_path):
    """(option=value, ...) -> the adapter of a finished run."""
    return lambda **options: train_run(output_dir=str(tmp_path / "first"), **options) / "adapter"


@pytest.fixture
def further(run_options):
    """Options of a run that starts from an adapter, with no budget of its own: (adapter) -> options."""
    return lambda adapter: {"start_from": str(adapter), "density": "none"}


@pytest.fixture
def without_report(monkeypatch) -> None:
    monkeypatch.setattr("scale_sft.training.lifecycle.write_report", lambda folder: folder / "report.html")


def indices_of(adapter: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(adapter / FILE).items() if name.endswith(".indices")}


def evaluations(run: Path) -> dict[int, float]:
    return {
        record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["event"] == "eval"
    }


# --- the state before step 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_before_step_1_the_model_is_base_plus_adapter_bit_for_bit_and_all_else_is_fresh(
    method, dtype, first, further, session, tiny_model
):
    adapter = first(method=method, dtype=dtype)
    started, fresh = (session(method=method, dtype=dtype, **more) for more in (further(adapter), {}))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=getattr(torch, dtype))
    apply_adapter(model, Adapter.load(adapter))
    found = dict(started.model.named_parameters())
    assert all(torch.equal(weight, found[name]) for name, weight in model.named_parameters())
    tuning = started.tuning
    assert started.step == 0 and tuning.counters() == fresh.tuning.counters()
    for name in tuning.store.names:
        state, new = tuning.state_of(name), fresh.tuning.state_of(name)
        assert torch.equal(state["indices"], Adapter.load(adapter).indices[name])
        assert torch.equal(state["deltas"], Adapter.load(adapter).deltas[name])
        for kind in new.keys() - {"indices", "deltas"}:
            assert torch.equal(state[kind], new[kind]), f"{kind} is not that of a new run"


@pytest.mark.parametrize("options", [{"delta_dtype": "bfloat16"}, {"drop_criterion": "change"}], ids=str)
def test_deltas_keep_their_bits_in_bfloat16_and_changes_are_counted_from_them(options, first, further, session):
    adapter = first(**options)
    store = session(**options, **further(adapter)).tuning.store
    for delta in store:
        stored = Adapter.load(adapter).deltas[delta.name]
        assert torch.equal(delta.deltas, stored)
        assert delta.reference is None or torch.equal(delta.reference, stored)


@pytest.mark.quantized
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_starts_with_the_answers_of_the_adapters_run(kind, first, further, train_run, pairs_file):
    options = {"quantization": kind, "eval_data": str(pairs_file)}
    adapter = first(**options)
    run = train_run(**options, **further(adapter), steps=2)
    assert evaluations(run)[0] == evaluations(adapter.parent)[6]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_the_loss_before_is_that_of_base_and_adapter_and_what_it_started_from_is_said(
    first, further, train_run, pairs_file, capsys
):
    adapter = first(eval_data=str(pairs_file))
    capsys.readouterr()
    run = train_run(eval_data=str(pairs_file), **further(adapter))
    before, after = evaluations(run)[0], evaluations(run)[6]
    assert before == evaluations(adapter.parent)[6] and after < before
    told = " ".join(capsys.readouterr().out.split())
    assert f"{before:.4f} before (base + that adapter), {after:.4f} after" in told
    rows = overview(load_run(run))
    assert (rows["Started from"], rows["Budget"]) == (str(adapter), "that of the adapter it started from")
    assert str(adapter) in (run / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_ag_and_ma_move_a_part_of_the_adapters_indices_and_static_keeps_all(method, first, further, train_run):
    adapter = first(method=method)
    run = train_run(method=method, **further(adapter))
    before, after = indices_of(adapter), indices_of(run / "adapter")
    assert {name: len(value) for name, value in before.items()} == {name: len(value) for name, value in after.items()}
    kept = sum(int(torch.isin(after[name], before[name]).sum()) for name in before)
    total = sum(map(len, before.values()))
    replaced = [r["replaced"] for r in read_metrics(run / "metrics.jsonl") if r["event"] == "reallocation"]
    if method == "static":
        assert kept == total and replaced == []
    else:
        assert 0 < replaced[0] <= 0.2 * total, "a finished adapter is not thrown away at the first reallocation"
        assert 0.7 * total < kept < total


def test_the_budget_is_the_adapters_own_even_where_no_budget_could_say_it(first, further, train_run, tmp_path):
    adapter = Adapter.load(first())
    half = {name: slice(None, value.numel() // (2 if ".0." in name else 1)) for name, value in adapter.indices.items()}
    indices, deltas = ({n: v[half[n]] for n, v in kind.items()} for kind in (adapter.indices, adapter.deltas))
    Adapter(indices, deltas, adapter.shapes, adapter.info).save(tmp_path / "pruned")
    run = train_run(**further(tmp_path / "pruned"))
    assert {n: len(v) for n, v in indices_of(run / "adapter").items()} == {
        f"{n}.indices": len(v) for n, v in indices.items()
    }


def test_a_budget_that_leads_to_the_same_counts_is_none_to_argue_about(first, train_run):
    assert train_run(start_from=str(first()), density=0.05).is_dir()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gone", [False, True], ids=["kept", "gone"])
def test_it_resumes_bit_for_bit_and_needs_the_adapter_no_more(
    method, gone, first, further, train_run, tmp_path, monkeypatch
):
    adapter = first(method=method)
    options = {"method": method, "save_every_steps": 2, **further(adapter)}
    whole = train_run(**options, output_dir=str(tmp_path / "whole"))
    original = train.forward_backward

    def crashing(session, batch):
        if session.step == 4:
            raise RuntimeError("the end of this process")
        return original(session, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", crashing)
        with pytest.raises(RuntimeError, match="the end of this process"):
            train_run(**options)
    if gone:
        shutil.rmtree(adapter)
    run = train_run(**options)
    assert (run / "adapter" / FILE).read_bytes() == (whole / "adapter" / FILE).read_bytes()


def test_a_run_resumes_with_the_adapter_that_it_started_from_alone(first, further, train_run, tmp_path):
    adapter = first()
    run = train_run(**further(adapter), save_every_steps=2)
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"start_from \(digest of its indices and deltas\): \w{64} in the .*, None now"):
        train_run()
    other = train_run(seed=1, output_dir=str(tmp_path / "other")) / "adapter"
    with pytest.raises(UserError, match=r"start_from \(digest of its indices and deltas\): "):
        train_run(start_from=str(other), density="none")


def test_without_the_adapter_and_without_checkpoints_there_is_one_error(train_run):
    with pytest.raises(
        UserError, match=r"^start_from: gone/adapter holds no adapter_config.json; expected the adapter/"
    ):
        train_run(start_from="gone/adapter")


# --- what does not fit ------------------------------------------------------------------------------------------------

MISFITS = {
    "a budget": (
        {"density": 0.06},
        r"has \d[\d,]+ entries, density 0.06 leads to [\d,]+ \(in '.*' \d+ and \d+\).*--density none where a recipe",
    ),
    "targets": (
        {"target_modules": "q_proj"},
        r"has 14 target weights, the run 2 .*its base is '.*Fix: .*--target_modules q_proj,k_proj,v_proj,o_proj,gate_p",
    ),
    "a dtype": ({"dtype": "bfloat16"}, r"of a base in float32, expected bfloat16 as in this run. Fix: --dtype float32"),
    "deltas": ({"delta_dtype": "bfloat16"}, r"deltas in float32, expected such as bfloat16 can hold. Fix: --delta_dt"),
    "another architecture": ({"base": "gpt2"}, r"has 14 target weights, the run 8 "),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_one_error_before_the_base_is_loaded(
    case, first, train_run, tiny_model, monkeypatch, tmp_path
):
    changed, message = MISFITS[case]
    options = {"density": "none", "start_from": str(first()), "output_dir": str(tmp_path / "second"), **changed}
    if "base" in changed:
        options["base"] = str(tiny_model(changed["base"]))
    monkeypatch.setattr(assemble, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=rf"^start_from: .*{message}"):
        train_run(**options)
    assert not list((tmp_path / "second").glob("*.yaml"))


@pytest.mark.quantized
def test_an_adapter_of_another_quantisation_is_refused(first, further, train_run):
    with pytest.raises(UserError, match=r"^start_from: .*quantization none, expected nf4 .*Fix: --quantization none"):
        train_run(**further(first()), quantization="nf4")


def test_another_base_of_the_same_shapes_is_known_by_its_hash(first, further, train_run, tiny_model, tmp_path):
    adapter = first()
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    shutil.copytree(tiny_model("llama"), tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=rf"^start_from: .*expected \w{{16}}..., that of '{tiny_model('llama')}'"):
        train_run(**further(adapter), base=str(tmp_path / "other"))


# --- other ways in ----------------------------------------------------------------------------------------------------


def test_a_finished_run_asked_for_more_steps_offers_the_command_that_works(first, train_run, tmp_path, run_options):
    adapter = first()
    with pytest.raises(UserError, match="finished and differs in steps") as error:
        train_run(output_dir=str(tmp_path / "first"), steps=12)
    offered = f"--start_from {adapter} --output_dir NEW"
    assert offered in str(error.value)
    words = offered.replace("NEW", str(tmp_path / "new")).split()
    run = train_run(**{words[0][2:]: words[1], words[2][2:]: words[3]}, steps=12)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12


def test_the_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(None, {"start_from": "~/run/adapter"}).sparse.start_from == f"{tmp_path}/run/adapter"


def test_train_in_python_takes_it_too(first, run_options, without_report):
    options = {name: value for name, value in run_options.items() if name != "density"}
    assert scale_sft.train(**options, start_from=first()).steps == 6


def test_attach_starts_from_an_adapter_and_detach_gives_the_base_back(first, tiny_model, run_options):
    adapter = Adapter.load(folder := first())
    fresh = lambda: AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model, tuned, base = fresh(), fresh(), fresh()
    apply_adapter(tuned, adapter)
    options = {"method": "ag", "total_steps": 4, "update_interval_steps": 2, "estimation_steps": 2}
    sparse = scale_sft.attach(model, start_from=folder, **options)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in tuned.state_dict().items())
    optimizer = sparse.optimizer(lr=1e-2)
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert optimizer.turnovers[0].replaced <= 0.2 * adapter.active()
    sparse.detach()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in base.state_dict().items())


def test_attach_leaves_a_model_of_another_base_as_it_was(first, tiny_model):
    folder, model = first(), AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UserError, match="^start_from: got a base whose target weights have the hash"):
        scale_sft.attach(model, start_from=folder)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with pytest.raises(UserError, match="^start_from: .*density 0.5 leads to"):
        scale_sft.attach(model, start_from=folder, density=0.5)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_plan_counts_the_adapters_entries(first, run_options):
    from click.testing import CliRunner

    from scale_sft.cli.plan import plan

    adapter = first()
    command = ["--base", run_options["base"], "--start_from", str(adapter), "--max_length", "32", "--json"]
    found = CliRunner().invoke(plan, command, catch_exceptions=False)
    assert json.loads(found.stdout)["active"] == Adapter.load(adapter).active()
