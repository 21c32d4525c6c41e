"""Methods are compared fairly: same batches, equal budgets, rates chosen on other data than what is reported."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from scale_sft.bench import page, rows
from scale_sft.bench.pool import Died, Pool
from scale_sft.bench.quality import measure as quality
from scale_sft.bench.quality.contestants import BASE, METHODS, choose
from scale_sft.bench.quality.intervals import PARTS
from scale_sft.bench.quality.summary import summaries
from scale_sft.bench.quality.tasks import Task, read_retained, read_tasks
from scale_sft.bench.quality.worker import run_job, split
from scale_sft.cli.main import main
from scale_sft.errors import UserError
from tests.expert_models import make_experts
from tests.processes import ends


@pytest.fixture
def settings(tiny_model, pairs_file):
    """(methods, option=value, ...) -> settings of runs of a second."""

    def make(methods=("ag", "lora"), grids=(), variants=(), seeds=1, tasks=(), retain=(), more_rungs=0, **options):
        small = {
            "base": str(tiny_model("llama")), "train_data": str(pairs_file), "eval_data": str(pairs_file), "steps": 4,
            "global_batch_size": 4, "rank_equivalent": 2, "dtype": "float32", "exact_match_examples": 2,
            "max_new_tokens": 4,
        }  # fmt: skip
        return quality.Settings(
            contestants=choose(methods, variants, grids),
            recipe=None,
            options={**small, **options},
            seeds=seeds,
            validation_examples=8,
            tasks=read_tasks(tasks),
            retained=read_retained(retain, read_tasks(tasks)),
            more_rungs=more_rungs,
        )

    return make


@pytest.fixture
def measure(tmp_path):
    """(settings) -> rows, and what was said, in this process."""

    def run(settings):
        said = []
        return quality.measure(settings, tmp_path, processes=1, say=said.append), said

    return run


def test_every_rate_is_tried_and_the_best_is_run_with_the_other_seeds(settings, measure, tmp_path):
    wanted = settings(grids=("ag=0.001,0.01", "lora=0.001,0.01"), seeds=2)
    found, said = measure(wanted)
    runs = [(row["settings"]["method"], row["settings"]["learning_rate"], row["settings"]["seed"]) for row in found]
    assert runs[:5] == [("base", None, 0)] + [(name, rate, 0) for rate in (1e-3, 1e-2) for name in ("ag", "lora")]
    for summary in summaries(found)[1:]:
        assert summary.best_rate == min(summary.grid, key=summary.grid.get)
        assert [row["settings"]["seed"] for row in summary.runs] == [0, 1]
    assert len(runs) == 7 and len(said) == 7
    ((_, tables, _),) = quality.report(found)
    learned, differences, costs = (table for _, table in tables)
    assert [line[0] for line in learned[1]] == ["base", "ag", "lora"] and "±" in learned[1][1][3]
    assert [line[:2] for line in differences[1]] == [["ag", "2"]] and differences[1][0][2].count("±") == 2
    assert [line[0] for line in costs[1]] == ["ag", "lora"] and not any("-" in line[2:] for line in costs[1])
    again, said = measure(wanted)
    by_settings = lambda some: {json.dumps(row["settings"]): row["result"] for row in some}
    assert by_settings(again) == by_settings(found)
    assert said == ["7 of 7 runs are done already"]
    assert len(rows.read_rows(tmp_path, "quality")) == 7


def test_runs_with_another_warm_up_are_other_runs(settings, measure):
    found = [measure(settings(["ag"], ["ag=0.01"], **options))[0] for options in ({}, {"warmup_fraction": 0.0})]
    assert [[row["settings"]["shared"]["warmup_fraction"] for row in rows] for rows in found] == [[None] * 2, [0.0] * 2]


def test_every_contestant_of_the_command_trains_and_measures_its_update(settings, measure):
    found, _ = measure(settings(METHODS, [f"{name}=0.01" for name in METHODS], steps=1, exact_match_examples=0))
    assert [row["settings"]["method"] for row in found] == ["base", *METHODS]
    for row in found[1:]:
        assert row["result"]["update_frobenius"] >= row["result"]["update_spectral"] > 0
        assert 0.5 < row["result"]["visible_fraction"] <= 1
    counts = {row["settings"]["method"]: row["result"]["trainable"] for row in found[1:]}
    whole = {
        counts.pop(name) for name in ("columns", "columns-sampled", "columns-grown")
    }  # less than a column below the budget
    assert {count for name, count in counts.items() if name not in ("ia3", "full")} == {counts["lora"]}
    assert len(whole) == 1 and 0.95 * counts["lora"] < whole.pop() <= counts["lora"]


def test_all_contestants_see_the_same_batches_and_none_sees_what_chooses_the_rate(settings):
    from scale_sft.training.inputs import read_inputs

    inputs = read_inputs(settings().job(Task(), BASE).config())
    left, validation = split(inputs, 8)
    texts = lambda examples: {tuple(examples.tokens(n)[0]) for n in range(len(examples))}
    assert len(left.train) == 16 and len(validation) == 8 and left.order.examples == 16
    assert texts(left.train) | texts(validation) == texts(inputs.train)
    assert not texts(left.train) & texts(validation)
    other, _ = split(read_inputs(settings().job(Task(), METHODS["full"], 0.1).config()), 8)
    assert other.train.digest() == left.train.digest() and other.order == left.order


def test_random_entries_are_never_reallocated_and_static_ones_once(settings, monkeypatch):
    from scale_sft import train

    steps = []
    monkeypatch.setattr(train, "reallocate", lambda session, metrics, step: steps.append(step))
    options = {"steps": 12, "exact_match_examples": 0}
    run_job(settings(["random"], **options).job(Task(), METHODS["random"], 0.01))
    assert steps == []
    run_job(settings(["static"], **options).job(Task(), METHODS["static"], 0.01))
    assert steps == [5]


def test_methods_are_the_same_until_the_first_reallocation(settings):
    wanted = settings(["ag", "static", "random"], steps=4, exact_match_examples=0)
    first, *others = (run_job(wanted.job(Task(), contestant, 0.01))["curve"] for contestant in wanted.contestants)
    for curve in others:  # one that proposes candidates keeps its batch in order: sums are rounded otherwise
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in first], rel=1e-5)


def test_dense_training_lowers_the_loss_in_both_dtypes(settings):
    for dtype in ("float32", "bfloat16"):
        wanted = settings(["full"], steps=12, dtype=dtype, exact_match_examples=0)
        before = run_job(wanted.job(Task(), BASE))
        after = run_job(wanted.job(Task(), METHODS["full"], 0.003))
        assert after["held_out_loss"] < before["held_out_loss"] - 0.3
        (losses, tokens), (_, tokens_before) = (zip(*one["held_out_parts"], strict=True) for one in (after, before))
        assert after["held_out_loss"] == pytest.approx(sum(losses) / sum(tokens), abs=1e-4)
        assert tokens == tokens_before and len(tokens) == min(PARTS, 24)
        assert after["curve"][-1][0] == 12 and after["curve"][-1][1] < after["curve"][0][1]


def test_the_peers_loop_is_that_of_ours_where_all_entries_are_trained(settings):
    """AdamW on every entry of the target weights, dense or as deltas: one and the same training."""
    wanted = settings(["full", "ag"], steps=3, exact_match_examples=0)
    mask = METHODS["random"]
    usual = {"betas": METHODS["full"].options["betas"]}
    whole = replace(mask, options={**mask.options, **usual, "rank_equivalent": "none", "density": "1"})
    dense, sparse = (run_job(wanted.job(Task(), contestant, 1e-3)) for contestant in (METHODS["full"], whole))
    assert dense["trainable"] == sparse["trainable"]
    assert sparse["held_out_loss"] == pytest.approx(dense["held_out_loss"], rel=1e-5)
    assert [loss for _, loss in sparse["curve"]] == pytest.approx([loss for _, loss in dense["curve"]], rel=1e-5)


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(settings, measure, monkeypatch):
    from scale_sft.bench.quality import peers as quality_peers
    from scale_sft.model.loss import token_loss_sum

    def fragile(model, batch, over):  # at the high rate the weights of the second step are far from those of the first
        broken = max(float(weight.detach().abs().max()) for weight in model.parameters()) > 1e3
        return token_loss_sum(model, batch, over) * (torch.nan if broken else 1.0)

    monkeypatch.setattr(quality_peers, "token_loss_sum", fragile)
    monkeypatch.setattr("scale_sft.model.loss.token_loss_sum", fragile)
    names = ("ag", "full")
    found, _ = measure(settings(names, [f"{name}=1e-3,1e5" for name in names], exact_match_examples=0))
    for row in found[3:]:
        assert row["result"]["failed"].startswith("step 2: the loss is nan")
    for summary in summaries(found)[1:]:
        assert summary.best_rate == 1e-3 and list(summary.failures) == [1e5]
    ((_, _, remarks),) = quality.report(found)
    assert "full: learning rate 100000: step 2: the loss is nan" in " ".join(remarks)


def test_a_run_that_crashed_is_tried_again(settings, measure, monkeypatch):
    def broken(job):
        raise RuntimeError("out of\nmemory")

    wanted = settings(["full"], ["full=1e-3"], exact_match_examples=0)
    monkeypatch.setattr(quality, "run_job", broken)
    found, _ = measure(wanted)
    assert {row["result"]["crashed"] for row in found} == {"RuntimeError: out of memory"}
    ((_, tables, remarks),) = quality.report(found)
    assert "no learning rate of 0.001 led to a result" in remarks[0] and tables[0][1][1][1][:2] == ["full", "-"]
    monkeypatch.undo()
    found, said = measure(wanted)
    assert "held_out_loss" in found[1]["result"] and len(said) == 2


def test_dense_training_reaches_fused_experts_and_lora_says_that_it_cannot(settings, tokenizer, tmp_path):
    base = make_experts("mixtral", tmp_path / "base")
    tokenizer.save_pretrained(base)
    wanted = settings(["full", "lora", "random"], base=str(base), steps=2, exact_match_examples=0, max_eval_examples=4)
    full, lora, sparse = (run_job(wanted.job(Task(), one, 1e-3)) for one in wanted.contestants)
    assert "experts of fused parameters" in lora["failed"] and "--methods" not in lora["failed"]
    assert full["visible_fraction"] > 0 and full["update_spectral"] <= full["update_frobenius"] < math.inf
    assert 0 < sparse["trainable"] < full["trainable"]


def made_up_row(method, rate, seed=0, loss=1.0, **result):
    figures = {
        "trainable": 100, "validation_loss": loss, "held_out_loss": loss + 0.01 * seed, "exact_match": 0.5,
        "seconds": 2.0, "tokens_per_second": 50.0, "peak_bytes": 2**20, "curve": [[1, 3.0], [2, loss]], **result,
    }  # fmt: skip
    shared = {
        "base": "demo", "train_data": "demo", "steps": 2, "global_batch_size": 4, "dtype": "float32",
        "rank_equivalent": 2, "validation_examples": 8,
    }  # fmt: skip
    return {"shared": shared, "method": method, "learning_rate": rate, "seed": seed}, figures


def test_a_best_rate_at_the_edge_of_its_grid_is_pointed_out(tmp_path):
    results = rows.Results(tmp_path, "quality")
    for method, losses in (("ag", (3, 1, 2)), ("ma", (3, 2, 1)), ("full", (1, 2, 3)), ("lora", (1,))):
        for rate, loss in zip((0.01, 0.03, 0.1), losses, strict=False):
            settings, figures = made_up_row(method, rate, loss=float(loss))
            results.add(settings, **figures)
    ((_, _, remarks),) = quality.report(rows.read_rows(tmp_path, "quality"))
    assert len(remarks) == 3
    assert "ma: the best rate, 0.1, is the highest" in remarks[0] and "ma=0.01,0.03,0.1,0.3" in remarks[0]
    assert "full: the best rate, 0.01, is the lowest" in remarks[1] and "full=0.003,0.01" in remarks[1]
    assert "only one learning rate was tried" in remarks[2]


def test_the_page_shows_each_group_of_settings_and_the_newest_row_of_each_run(tmp_path):
    results = rows.Results(tmp_path, "quality")
    old, figures = made_up_row("ours-ag", 0.01, loss=9.0)
    results.add({**old, "shared": {**old["shared"], "steps": 1}}, **figures)
    results.add(old, crashed="RuntimeError: out of memory")
    results.add(made_up_row("base", None)[0], **made_up_row("base", None, trainable=0, retained={"news": 3.0})[1])
    for rate, seed, loss in ((0.01, 0, 1.0), (0.1, 0, 2.0), (0.01, 1, 1.0)):
        settings, figures = made_up_row("ag", rate, seed, loss, retained={"news": 3.5}, visible_fraction=0.25)
        results.add(settings, **figures)
    results.add(made_up_row("full", 0.1)[0], failed="step 2: the loss is nan")
    part = quality.part(rows.read_rows(tmp_path, "quality"))
    learned, costs, before, _ = part.tables
    assert "2 steps of 4 sequences" in learned.title and "1 steps of 4 sequences" in before.title
    lines = {cells[0]: dict(zip(learned.columns, cells, strict=True)) for cells in learned.rows}
    assert (lines["ag"]["rate"], lines["ag"]["seeds"]) == ("0.01", "2")
    assert lines["ag"]["held-out loss"] == "1.0050 ± 0.0635"  # 12.706 * 0.00707 / sqrt(2)
    assert (lines["base"]["loss on news"], lines["ag"]["loss on news"]) == ("3.000", "3.500 ± 0.000")
    assert lines["full"]["loss on news"] == "-"
    assert dict(zip(costs.columns, costs.rows[0], strict=True))["visible in bf16"] == "25.0 %"
    assert before.rows[0][:2] == ["ag", "0.01"] and "9.0000" in before.rows[0]
    text = page.write_page(tmp_path).read_text()
    assert text.count("<svg") == 4 + 3 and "the loss is nan" in text
    lines = quality.write_csv(tmp_path).read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("task,base,") and "retained.news,retained.news ci95" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "randon"], "did you mean 'random'?"),
        (["--learning-rates", "stattic=1"], "did you mean 'static'?"),
        (["--learning_rates", "full=fast"], "--learning_rates full: got 'fast', expected numbers above 0"),
        (["--variant", "slim=lora,method=ma"], "expected an option that lora has: betas, eps, weight_decay"),
        (["--variant", "slim=ag,candidate_ratios=0.5"], "did you mean 'candidate_ratio'?"),
        (["--variant", "slim=ag,candidate_ratio=much"], "slim: 1 mistake"),
        (["--learning-rates", "full=1e9"], "learning_rate: got 1000000000.0"),
        (["--variant", "slim=ag,learning_rate=1"], "expected option=value"),
        (["--variant", "slim=ag,start_from=runs/a/adapter"], "expected option=value"),
        (["--variant", "full=ag,candidate_ratio=1"], "the name 'full' is taken"),
        (["--variant", "slim"], "expected NAME=METHOD,option=value"),
        (["--validation_examples", "4000"], "--validation_examples: got 4000, but the training data are 2500 examples"),
    ],
)
def test_what_was_asked_for_wrongly_is_said_before_anything_runs(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["bench", "quality", "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "out" / "quality.jsonl").exists()


def test_all_contestants_start_from_the_base(settings, measure):
    with pytest.raises(UserError, match="^start_from: got runs/a/adapter, expected none: peers cannot"):
        measure(settings(start_from="runs/a/adapter"))


def test_a_missing_peft_names_the_extra_before_anything_runs(settings, measure, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"scale_sft\[bench\]"):
        measure(settings(["full", "lora"]))


def test_a_recipe_gives_what_the_command_does_not_and_must_have_an_equal_budget(settings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {steps: 7, global_batch_size: 8}\nsparse: {density: 0.1}\ndata: {eval_data: demo}\n")
    wanted = quality.Settings(
        contestants=choose(["full"], [], []),
        recipe=str(recipe),
        options={"rank_equivalent": 2},
        seeds=1,
        validation_examples=8,
    )
    config = wanted.job(Task(), METHODS["full"], 0.5, seed=3).config()
    assert (config.run.steps, config.run.global_batch_size, config.run.seed) == (7, 8, 3)
    assert (config.sparse.rank_equivalent, config.sparse.density) == (2, None)
    without = quality.Settings(**{**vars(wanted), "options": {}})
    with pytest.raises(UserError, match="--rank: needed"):
        quality.measure(without, tmp_path, processes=1, say=print)


def test_a_variant_has_its_own_line_with_its_options(settings, measure):
    wanted = settings(["ag"], ["ag=0.01", "slim=0.01"], ["slim=ag,betas=0.7,0.9,delta_dtype=bfloat16"])
    found, _ = measure(wanted)
    assert [row["settings"]["method"] for row in found] == ["base", "ag", "slim"]
    assert found[2]["settings"]["options"] == {"method": "ag", "betas": "0.7,0.9", "delta_dtype": "bfloat16"}
    assert found[1]["result"]["held_out_loss"] != found[2]["result"]["held_out_loss"]


def sleep(seconds):
    time.sleep(seconds)


@pytest.mark.slow
def test_processes_end_with_the_pool_idle_or_at_work():
    with Pool(sleep, processes=2) as pool:
        results = pool.results([0, 300])
        next(results)
        processes = [process for process, _ in pool._busy.values()] + [process for _, process in pool._idle]
        assert len(processes) == 2 and all(process.is_alive() for process in processes)
        began = time.monotonic()
    assert not any(process.is_alive() for process in processes) and time.monotonic() - began < 30


@pytest.mark.slow
def test_processes_at_work_end_when_the_one_that_started_them_is_killed(tmp_path):
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(f"""
import os, pathlib, time
from scale_sft.bench.pool import Pool
def work(item):
    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
    time.sleep(300)
if __name__ == "__main__":
    list(Pool(work, processes=2).results([0]))
""")
    with subprocess.Popen([sys.executable, script]) as parent:
        began = any((pid.is_file() and pid.read_text()) or time.sleep(0.1) for _ in range(600))
        parent.kill()
    assert began and ends(int(pid.read_text()), 60)


def die_at_three(n):
    if n == 3:
        os._exit(7)
    if n == 4:
        raise ValueError("four")
    return n * n


@pytest.mark.slow
def test_a_process_that_dies_takes_only_its_own_work_along():
    with Pool(die_at_three, processes=2, threads=1) as pool:
        found = {n: str(result) for n, result in pool.results(range(6))}
        assert found == {0: "0", 1: "1", 2: "4", 3: "its process ended with status 7", 4: "four", 5: "25"}
        assert dict(pool.results([3]))[3].args and isinstance(dict(pool.results([3]))[3], Died)


def test_the_command_compares_methods_on_two_tasks(tmp_path, tiny_model, pairs_file):
    news = tmp_path / "news.txt"
    news.write_text("It rained on Tuesday.\nThe sun shone on Wednesday.\n")
    names = ("random", "lora")
    grids = [argument for name in names for argument in ("--learning-rates", f"{name}=0.01")]
    arguments = [
        *("--base", str(tiny_model("llama")), "--dtype", "float32", "--steps", "1", "--seeds", "1", *grids),
        *("--methods", ",".join(names)),
        *("--task", f"sums={pairs_file},{pairs_file},exact_match_examples=1,max_new_tokens=1"),
        *("--task", f"long={pairs_file},{pairs_file},max_length=32", "--retain", "sums", "--retain", f"news={news}"),
        *("--global-batch-size", "2", "--validation-examples", "4", "--jobs", "1", "--output", str(tmp_path)),
    ]
    result = CliRunner().invoke(main, ["bench", "quality", *arguments])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]
    assert {row["settings"]["method"] for row in found} == {"base", *names}
    for task, kept in (("sums", {"news"}), ("long", {"sums", "news"})):
        own = [row for row in found if row["settings"]["shared"]["task"] == task]
        assert len(own) == 1 + len(names) and all(set(row["result"]["retained"]) == kept for row in own)
        assert all(0 <= row["result"].get("exact_match", -1) <= 1 for row in own) == (task == "sums")
    assert all(row["result"]["held_out_loss"] > 0 for row in found)
    assert "1 runs are done" not in result.output and "\nsums\n" in result.output and "\nlong\n" in result.output
    assert (tmp_path / "bench.html").is_file() and (tmp_path / "quality.csv").is_file()
