import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from scale_sft import train
from scale_sft.adapters.format import Adapter
from scale_sft.data.micro_batches import collate
from scale_sft.errors import UserError
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.targets import find_targets
from scale_sft.reporting.metrics import NullMetrics
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.training import assemble
from scale_sft.training.checkpoints import Checkpoints
from scale_sft.training.run_folder import RunFolder
from tests.methods import ESTIMATED


def adapter_tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == kind]


def dense_deltas(run: Path) -> Tensor:
    """All deltas of an adapter laid into zeros, one weight after the other."""
    adapter = Adapter.load(run / "adapter")
    return torch.cat(
        [
            torch.zeros(shape[0] * shape[1]).index_put_((adapter.indices[name].long(),), adapter.deltas[name])
            for name, shape in adapter.shapes.items()
        ]
    )


@pytest.mark.parametrize("method", ["ag", "ma", "static"])
def test_two_runs_with_the_same_seed_give_bit_identical_deltas(train_run, tmp_path, method: str) -> None:
    one, two, other = (
        adapter_tensors(train_run(method=method, seed=seed, output_dir=str(tmp_path / f"run{n}")))
        for n, seed in enumerate((1, 1, 2))
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_density_without_reallocation_gives_the_losses_of_dense_fine_tuning(
    train_run, tiny_model, session, architecture, checkpointing: bool
) -> None:
    options = {
        "base": str(tiny_model(architecture)), "density": 1.0, "steps": 8, "estimation_steps": 20,
        "update_interval_steps": 20, "learning_rate": 2e-3, "log_every_steps": 1, "lr_schedule": "constant",
        "warmup_fraction": 0, "gradient_checkpointing": checkpointing, "micro_batch_size": 2,
    }  # fmt: skip
    losses = [record["loss"] for record in records(train_run(**options), "step")]
    inputs = session(**options).inputs
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    targets = find_targets(model, None)
    model.requires_grad_(False)
    weights = [target.module.weight.requires_grad_(True) for target in targets]
    stock = torch.optim.AdamW(weights, lr=2e-3, betas=(0.8, 0.999), eps=1e-8, weight_decay=0.0)
    expected = []
    for step in range(1, 9):
        members = inputs.order.batch(step)
        batch = collate(inputs.train, members, inputs.tokenizer.pad_token_id, torch.device("cpu"))
        loss = token_loss_sum(model, batch) / inputs.train.target_tokens(members)
        stock.zero_grad()
        loss.backward()
        stock.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("method", ["ag", "ma", "static"])
def test_the_cut_into_micro_batches_does_not_change_the_deltas(train_run, tmp_path, method: str) -> None:
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1; candidates are proposed by the same sequence each time."""
    results, losses = [], []
    for size in (8, 4, 2, 1):
        run = train_run(
            method=method, global_batch_size=8, micro_batch_size=size, output_dir=str(tmp_path / f"run{size}"),
            log_every_steps=1, proposal_batch_size=None if method == "ma" else 1,
        )  # fmt: skip
        results.append(dense_deltas(run))
        losses.append([record["loss"] for record in records(run, "step")])
    for deltas, curve in zip(results[1:], losses[1:], strict=True):
        torch.testing.assert_close(deltas, results[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(deltas != 0, results[0] != 0)
        assert curve == pytest.approx(losses[0], rel=1e-5)


def test_the_loss_is_the_mean_over_the_target_tokens_of_the_global_batch(session) -> None:
    run = session(global_batch_size=6, micro_batch_size=2)
    batch = run.inputs.order.batch(1)
    run.tuning.begin_step(1)
    loss, tokens = train.forward_backward(run, batch)
    sums, count = 0.0, 0
    stock = AutoModelForCausalLM.from_pretrained(run.inputs.config.model.base)
    for n in batch:  # one by one, with the loss of transformers
        ids, labels = (torch.from_numpy(part.astype("int64"))[None] for part in run.inputs.train.tokens(n))
        targets = int((labels[:, 1:] != -100).sum())
        sums, count = sums + stock(input_ids=ids, labels=labels).loss.item() * targets, count + targets
    assert loss == pytest.approx(sums / count, rel=1e-5) and tokens["target"] == count


def test_the_number_of_active_entries_is_the_same_at_every_reallocation(train_run) -> None:
    run = train_run(steps=8, initial_replacement_fraction=0.5)
    found = records(run, "reallocation")
    assert [record["step"] for record in found] == [2, 4, 6, 8]
    assert len({record["active"] for record in found}) == 1 and found[0]["replaced"] > 0


def test_static_selection_reallocates_once(train_run) -> None:
    assert [record["step"] for record in records(train_run(**ESTIMATED), "reallocation")] == [2]


def test_a_run_writes_what_it_promises(train_run, pairs_file) -> None:
    run = train_run(eval_data=str(pairs_file), max_eval_examples=6, eval_every_steps=3, exact_match_examples=2,
                    max_new_tokens=4, save_merged=True)  # fmt: skip
    assert {"adapter", "merged", "metrics.jsonl", "config.yaml"} <= {path.name for path in run.iterdir()}
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert [record["step"] for record in records(run, "eval")] == [0, 3, 6]
    AutoModelForCausalLM.from_pretrained(run / "merged")


# --- what stops a run -------------------------------------------------------------------------------------------


def break_the_loss(monkeypatch, at_call: int, value: float) -> None:
    """From the n-th micro-batch on, the loss is `value`."""
    from scale_sft.model import loss

    calls = [0]

    def broken(model, batch, over):
        calls[0] += 1
        return token_loss_sum(model, batch, over) * (value if calls[0] >= at_call else 1.0)

    monkeypatch.setattr(loss, "token_loss_sum", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("method", "step"), [("ag", 1), ("ag", 3), ("ag", 4), ("ma", 2)])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_deltas(
    train_run, monkeypatch, tmp_path, value: float, method: str, step: int
) -> None:
    """In every phase: the error names step and learning rate, and the deltas saved are those before that step."""
    good: dict[int, Tensor] = {}
    begin_step = SparseFineTuning.begin_step

    def remember(tuning, number: int) -> None:
        good[number - 1] = tuning.store.flat.clone()
        begin_step(tuning, number)

    monkeypatch.setattr(SparseFineTuning, "begin_step", remember)
    break_the_loss(monkeypatch, step, value)
    with pytest.raises(UserError, match=rf"^step {step}: the loss is (nan|inf).* at learning rate 0\.0\d+") as error:
        train_run(method=method, lr_schedule="constant", warmup_fraction=0)
    assert "\n" not in str(error.value) and str(tmp_path / "run" / "adapter") in str(error.value)
    saved = Adapter.load(tmp_path / "run" / "adapter")
    assert torch.equal(torch.cat(list(saved.deltas.values())), good[step - 1])


def test_a_learning_rate_far_too_high_is_one_error_with_nothing_broken_saved(train_run, tmp_path) -> None:
    for method in ("ag", "ma"):
        output = tmp_path / method
        with pytest.raises(
            UserError, match=r"^step \d: .* at learning rate 1e\+06; the deltas of step \d are saved in"
        ):
            train_run(
                method=method, learning_rate=1e6, lr_schedule="constant", warmup_fraction=0, output_dir=str(output)
            )
        Adapter.load(output / "adapter")


def test_deltas_that_have_overflowed_are_not_saved_as_a_good_state(session, tmp_path) -> None:
    run, folder = session(), RunFolder(tmp_path / "run")
    run.optimizer.steps = 6
    run.tuning.store["model.layers.0.mlp.up_proj.weight"].deltas[3] = torch.inf
    with pytest.raises(UserError, match="the deltas of step 6 have overflowed and are not saved"):
        train.finite_or_stop(run, NullMetrics(), Checkpoints(run, folder), float("nan"), 1.0)
    assert not folder.adapter.exists()


def test_a_candidates_gradient_that_is_no_number_stops_the_run_too(session, tmp_path) -> None:
    run, folder = session(), RunFolder(tmp_path / "run")
    run.tuning.begin_step(1)
    run.tuning.recorder.flat[-1] = torch.nan
    with pytest.raises(UserError, match="^step 1: "):
        train.finite_or_stop(run, NullMetrics(), Checkpoints(run, folder), 2.0, 1.0)


def test_a_weight_that_no_gradient_reaches_is_named_at_step_1(train_run, tiny_model, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "base")
    for file in tiny_model().glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        UserError, match=r"no gradient reached 'model\.layers\.1\.mlp\.(gate|up)_proj\.weight' at step 1"
    ):
        train_run(base=str(tmp_path / "base"))
    assert not (tmp_path / "run" / "adapter").exists()
    train_run(base=str(tmp_path / "base"), target_modules="q_proj", output_dir=str(tmp_path / "again"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_another_run_is_left_as_it_is(train_run, monkeypatch) -> None:
    run = train_run(steps=2)
    before = contents(run)
    monkeypatch.setattr(assemble, "load_base", lambda *_, **__: pytest.fail("a weight was loaded"))
    with pytest.raises(UserError, match="output_dir: .* already holds a run"):
        train_run(steps=3, seed=5)
    assert contents(run) == before


# --- bad input: one message, no traceback, before any weight is loaded, and nothing is written ------------------

LINES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n',
    "fields.jsonl": '{"question": "a", "answer": "b"}\n',
    "targets.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n',
}
BAD_INPUT = {
    "tracker": (["--tracker", "wnadb"], "tracker: unknown 'wnadb'; did you mean 'wandb'?"),
    "option": (["--densty", "0.1"], "unknown option --densty; did you mean 'density'?"),
    "density 0": (["--density", "0"], "density: got 0.0, must be in (0, 1]"),
    "negative density": (["--density", "-0.5"], "density: got -0.5, must be in (0, 1]"),
    "density above 1": (["--density", "1.5"], "density: got 1.5, must be in (0, 1]"),
    "no budget": (["--density", "none"], "expected exactly one of density, tunable_weights, rank_equivalent"),
    "two budgets": (["--tunable_weights", "9"], "got density 0.05 and tunable_weights 9"),
    "a total too large": (["--density", "none", "--tunable_weights", "99999999"], "tunable_weights: got 99,999,999"),
    "a total too small": (["--density", "none", "--tunable_weights", "13"], "tunable_weights: got 13, "),
    "target": (
        ["--target_modules", "query"],
        "target_modules: 'query' matches no layer; this model has embed_tokens (1x), q_proj",
    ),
    "one end of tied ones": (
        ["--base", "GPT2", "--target_modules", "wte", "--exclude_modules", "lm_head"],
        "tied). Fix: leave out both, or neither",
    ),
    "regular expression": (["--target_modules", "q_(proj"], "regular expression: missing )"),
    "missing data": (["--train_data", "MISSING.jsonl"], "MISSING.jsonl"),
    "empty data": (["--train_data", "empty.jsonl"], "empty.jsonl is empty"),
    "data that is not JSON": (["--train_data", "broken.jsonl"], "broken.jsonl, line 2: not JSON"),
    "data without the fields": (
        ["--train_data", "fields.jsonl"],
        "expected the fields messages; prompt and completion",
    ),
    "missing held-out data": (["--eval_data", "MISSING.jsonl"], "MISSING.jsonl"),
    "no target token": (["--train_data", "targets.jsonl"], "line 2: no token to learn from"),
    "micro-batch": (["--micro_batch_size", "3"], "global_batch_size 4 does not divide by 3; nearest that does: 2"),
    "ranks": (["--global_batch_size", "7"], "global_batch_size: 7 does not divide over 2 ranks; nearest that does: 8"),
    "base": (["--base", "MISSING-MODEL"], "MISSING-MODEL"),
    "hub base": (["--base", "nobody/no-such-model"], "base: 'nobody/no-such-model'"),
    "length": (["--max_length", "4096"], "max_length: got 4096, but the base has positions for 128 tokens only"),
    "recipe": (["--config", "MISSING.yaml"], "MISSING.yaml: no such file"),
    "recipe key": (["--config", "recipe.yaml"], "unknown key 'sparse.densty'; did you mean 'density'?"),
    "output folder": (["--output_dir", "broken.jsonl"], "broken.jsonl is a file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_error_before_any_weight_is_loaded(
    case: str, train_cli, run_options, tiny_model, tmp_path, monkeypatch
) -> None:
    for name, text in LINES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "recipe.yaml").write_text("sparse: {densty: 0.1}\n")
    arguments, expected = BAD_INPUT[case]
    places = {"GPT2": str(tiny_model("gpt2")), **{name: str(tmp_path / name) for name in [*LINES, "recipe.yaml"]}}
    places |= {name: str(tmp_path / name) for name in ("MISSING.jsonl", "MISSING.yaml", "MISSING-MODEL")}
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options = {f"--{name}": str(value) for name, value in run_options.items()}
    if "--tunable_weights" in given and "--density" in given:
        del options["--density"], given["--density"]
    options |= {name: places.get(value, value) for name, value in given.items()}
    if case == "ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(assemble, "load_base", lambda *_, **__: pytest.fail("a weight was loaded"))
    before = contents(tmp_path)
    result = train_cli(*[part for option in options.items() for part in option])
    said = " ".join(result.stderr.split())
    assert result.exit_code in (1, 2), result.output
    assert expected in said
    assert said.lower().count("error:") == 1 and "Traceback" not in said and not result.stdout
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_a_base_of_another_kind_is_one_error(train_cli, run_options, tiny_model, tmp_path) -> None:
    config = json.loads((tiny_model() / "config.json").read_text())
    (tmp_path / "base").mkdir()
    for file in tiny_model().glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    for change in ({"model_type": "no-such-kind"}, {"quantization_config": {"quant_method": "no-such-method"}}):
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **change}))
        options = {**run_options, "base": tmp_path / "base"}
        result = train_cli(*[part for name, value in options.items() for part in (f"--{name}", value)])
        assert result.exit_code == 1 and "error: base: " in result.stderr and "Traceback" not in result.output


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_status_1_where_it_cannot_go_on(run_cli, run_options) -> None:
    options = [part for name, value in {**run_options, "density": 2}.items() for part in (f"--{name}", value)]
    done = run_cli(*options)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: 1 mistake") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_trains_from_any_folder(run_cli, run_options) -> None:
    done = run_cli(*[part for name, value in run_options.items() for part in (f"--{name}", value)])
    assert done.returncode == 0, done.stderr
    assert (Path(run_options["output_dir"]) / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("train_data", "eval_data", "method", "rate"),
    [
        ("t0_train.jsonl", "t0_eval.jsonl", "ag", 1e-2),
        ("gsm8k_train_messages.jsonl", "gsm8k_test_messages.jsonl", "ma", 5e-2),
    ],
)
def test_a_pretrained_model_learns_real_data(train_run, shared, train_data, eval_data, method, rate) -> None:
    """Prompt and completion, and conversations: held-out loss falls clearly below that of the base."""
    run = train_run(
        base=str(shared("models/llama-7m")), train_data=str(shared(f"data/{train_data}")),
        eval_data=str(shared(f"data/{eval_data}")), max_train_examples=200, max_eval_examples=16, max_length=None,
        method=method, learning_rate=rate, steps=12, global_batch_size=4, update_interval_steps=6, estimation_steps=3,
        warmup_fraction=0.03,
    )  # fmt: skip
    before, after = (record["loss"] for record in records(run, "eval"))
    assert after < before - 0.5, (before, after)
