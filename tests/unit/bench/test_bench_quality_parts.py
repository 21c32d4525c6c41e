"""A search ends with its best rate inside the grid; figures say how far they can be trusted."""

import json
import math
from statistics import mean, stdev

import pytest
import torch

from scale_sft.bench.pool import Pool
from scale_sft.bench.quality.contestants import EARLIER_NAMES, METHODS, choose
from scale_sft.bench.quality.intervals import Figure, half_width_over_parts, t_quantile
from scale_sft.bench.quality.search import Search
from scale_sft.bench.quality.summary import groups_of, present, rung_beyond, settings_key, summaries
from scale_sft.bench.quality.table import difference_table
from scale_sft.bench.quality.tasks import read_retained, read_tasks, retained_by
from scale_sft.bench.quality.updates import Update, figures, spectral_norm
from scale_sft.config.options import SECTIONS
from scale_sft.errors import UserError


def searched(loss_of, grid, seeds=3, more_rungs=3):
    """All runs of a search in order, and what it said."""
    search, said = Search("ag", grid, seeds, more_rungs), []
    waiting, done = search.begin(), []
    while waiting:
        run = waiting.pop(0)
        done.append(run)
        more, told = search.finish(run, loss_of(run[0]))
        waiting += more
        said += [told] if told else []
    return done, said


@pytest.mark.parametrize(
    ("best", "more", "seeds_at"),
    [
        (0.01, [], 0.01),
        (0.04, [0.04, 0.08], 0.04),  # 0.08 is worse: the best is inside
        (0.001, [0.0025, 0.0013, 0.0007], 0.0013),
        (10.0, [0.04, 0.08, 0.16], 0.16),  # at most three rungs
    ],
)
def test_a_grid_grows_until_its_best_rate_is_inside(best, more, seeds_at):
    done, said = searched(lambda rate: abs(math.log(rate / best)), (0.005, 0.01, 0.02))
    assert [rate for rate, seed in done if seed == 0] == [0.005, 0.01, 0.02, *more]
    assert [run for run in done if run[1]] == [(seeds_at, 1), (seeds_at, 2)]
    assert len(said) == len(more) and all(f"trying {rate:g} too" in told for rate, told in zip(more, said, strict=True))


def test_a_run_that_fails_bounds_the_grid_and_one_rate_is_no_grid():
    done, said = searched(lambda rate: None if rate > 0.01 else 1 / rate, (0.005, 0.01, 0.02), seeds=1)
    assert len(done) == 3 and not said
    assert searched(lambda rate: 1.0, (0.01,), seeds=2) == ([(0.01, 0), (0.01, 1)], [])
    assert searched(lambda rate: None, (0.01, 0.02)) == ([(0.01, 0), (0.02, 0)], [])
    assert searched(lambda rate: 1 / rate, (0.01, 0.02), seeds=1, more_rungs=0) == ([(0.01, 0), (0.02, 0)], [])
    assert rung_beyond((0.01, 0.03, 0.1), 0.1) == 0.3 and rung_beyond((0.01, 0.03, 0.1), 0.03) is None


@pytest.mark.parametrize("grid", [(8e-3, 9e-3, 1e-2), (1e-2, 1.05e-2), (1e-2, 1.001e-2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_fine_grid_grows_too(grid, sign):
    done, _ = searched(lambda rate: -sign * rate, grid, seeds=2)
    tried = [rate for rate, seed in done if seed == 0]
    assert len({*tried}) == len(grid) + 3 and done[-1] == (max(tried, key=lambda rate: sign * rate), 1)


def test_an_interval_is_that_of_the_t_distribution():
    values = [4.242, 4.236, 4.178]
    found = Figure.of(values)
    assert found.mean == pytest.approx(mean(values)) and found.count == 3
    assert found.half_width == pytest.approx(4.303 * stdev(values) / math.sqrt(3))
    assert Figure.of([1.0]) == Figure(1.0, None, 1) and Figure.of([]) is None
    quantiles = [t_quantile(degrees) for degrees in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True) and t_quantile(60) == pytest.approx(2.000, abs=2e-3)


def test_the_interval_over_parts_is_that_of_a_mean_and_knows_a_constant_quotient():
    sums = [3.0, 5.0, 4.0, 8.0]
    found = half_width_over_parts(sums, [2] * 4)
    assert found == pytest.approx(3.182 * stdev(sums) / 2 / math.sqrt(4))
    assert half_width_over_parts([1.0, 2.0, 3.0], [10, 20, 30]) == pytest.approx(0.0, abs=1e-12)
    assert half_width_over_parts([1.0], [10]) is None and half_width_over_parts([1.0, 0.0], [10, 0]) is None


def test_the_interval_over_parts_holds_the_truth_as_often_as_it_says():
    draw, held, rounds = torch.Generator().manual_seed(0), 0, 400
    for _ in range(rounds):
        counts = torch.randint(5, 60, (32,), generator=draw)
        sums = 0.5 * counts + torch.randn(32, generator=draw) * counts.sqrt()
        width = half_width_over_parts(sums.tolist(), counts.tolist())
        held += abs((sums.sum() / counts.sum()).item() - 0.5) <= width
    assert 0.92 <= held / rounds <= 0.98


def row(method="ag", rate=0.01, seed=0, loss=1.0, shared=None, **more):
    settings = {"shared": {"base": "demo", "steps": 4, **(shared or {})}, "method": method, "kind": "ours"}
    return {"settings": {**settings, "learning_rate": rate, "seed": seed, **more}, "result": {"held_out_loss": loss}}


def test_methods_are_compared_seed_by_seed():
    rows = [row(name, seed=seed, loss=seed + extra) for seed in (0, 1, 2) for name, extra in (("lora", 0), ("ag", 0.5))]
    for one in rows:
        one["result"]["validation_loss"] = one["result"]["held_out_loss"]
    lora, ag = summaries(rows)
    assert ag.difference(lora, "held_out_loss") == Figure(0.5, 0.0, 3) and ag.figure("held_out_loss").half_width > 2


def test_a_difference_says_how_far_it_depends_on_seeds_and_on_examples():
    def rows(parts):
        found = [row(name, seed=seed) for name in ("lora", "ag") for seed in (0, 1)]
        for one in found:
            lora, seed = one["settings"]["method"] == "lora", one["settings"]["seed"]
            losses = [5, 5, 5] if lora else [6, 7, 8 + seed]
            loss = sum(losses) / 30
            one["result"] = {"validation_loss": 1.0, "held_out_loss": loss, "retained": {"news": 2 * loss}}
            if parts:
                of_all = [[loss, 10] for loss in losses]
                one["result"] |= {"held_out_parts": of_all, "retained_parts": {"news": [[2 * a, b] for a, b in of_all]}}
        return found

    columns, lines = difference_table(rows(True))
    by_seeds, by_examples = Figure.of([6 / 30, 7 / 30]), half_width_over_parts([1, 2, 3.5], [10] * 3)
    cell = f"+{by_seeds.mean:.4f} ± {by_seeds.half_width:.4f} (± {by_examples:.4f})"
    twice = f"+{2 * by_seeds.mean:.4f} ± {2 * by_seeds.half_width:.4f} (± {2 * by_examples:.4f})"
    assert columns == ["method", "seeds", "held-out loss", "loss on news"] and lines == [["ag", "2", cell, twice]]
    assert "(" not in "".join(difference_table(rows(False))[1][0])  # rows of an earlier version
    assert difference_table(rows(True)[:2]) is None and difference_table(rows(True)[2:]) is None


def test_runs_of_another_contestant_that_had_the_name_are_no_further_seeds():
    rows = [row("slim", seed=seed, options={"moments": kind}) for kind in ("float32", "int8") for seed in (0, 1)]
    for one in rows:
        one["result"]["validation_loss"] = 1.0
    (summary,) = summaries(rows)
    assert [one["settings"]["options"] for one in summary.runs] == [{"moments": "int8"}] * 2


def test_rows_of_a_version_with_fewer_options_and_earlier_names_are_those_of_today():
    new = {"score": "gradient", "draw": "top"}
    assert settings_key(row()["settings"]) == settings_key(row(shared=new)["settings"])
    assert settings_key(row()["settings"]) != settings_key(row(shared={"score": "snr"})["settings"])
    assert {name for kind in SECTIONS.values() for name in kind.__dataclass_fields__} >= set(new)
    assert settings_key(present(row("ours-ag"))["settings"]) == settings_key(row("ag")["settings"])
    assert present(row("random-mask"))["settings"]["method"] == "random-mask"  # other entries than those of `random`
    assert len(groups_of([row(), row(shared=new), row(shared={"steps": 8}), row()])) == 2
    assert groups_of([row(), row(shared={"steps": 8}), row()])[0][0]["settings"]["shared"]["steps"] == 4


def test_earlier_names_choose_the_contestants_of_today():
    chosen = choose(list(EARLIER_NAMES), ["slim=ours-ag,moments=int8"], ["peft-lora=0.5", "slim=0.25"])
    assert [one.name for one in chosen] == [*EARLIER_NAMES.values(), "slim"]
    rates = {one.name: one.learning_rates for one in chosen}
    assert rates["lora"] == (0.5,) and rates["slim"] == (0.25,) and set(EARLIER_NAMES.values()) <= set(METHODS)


def test_tasks_and_retained_data_are_read_from_the_command_line():
    tasks = read_tasks(["a=x.jsonl?split=train,y.jsonl,max_length=64,loss_on=all", "b=train_data=z.jsonl,eval_data=w"])
    assert tasks[0].options == {
        "train_data": "x.jsonl?split=train", "eval_data": "y.jsonl", "max_length": "64", "loss_on": "all",
    }  # fmt: skip
    assert tasks[1].options == {"train_data": "z.jsonl", "eval_data": "w"}
    retained = read_retained(["a", "news=n.txt,max_eval_examples=8"], tasks)
    (news,) = retained_by(tasks[0], tasks, retained)
    assert (news.source, news.options) == ("n.txt", {"max_eval_examples": "8"})
    other, _ = retained_by(tasks[1], tasks, retained)
    assert (other.name, other.source, other.options) == ("a", "y.jsonl", {"max_length": "64", "loss_on": "all"})
    assert read_tasks([])[0].name == "" and read_retained([], tasks) == ()


@pytest.mark.parametrize(
    ("tasks", "retain", "message"),
    [
        (["a"], [], "--task: got 'a', expected NAME=..., such as"),
        (["a=x.jsonl"], [], "--task: got 'a=x.jsonl', expected NAME=TRAIN,EVAL"),
        (["a=x,y,z"], [], "expected NAME=TRAIN,EVAL"),
        (["a=x,y,max_lenght=3"], [], "did you mean 'max_length'?"),
        (["a=x,y,learning_rate=1"], [], "--task a: got learning_rate, expected options of data"),
        (["a=x,y,method=ma"], [], "--task a: got method, expected options of data"),
        (["a=x,y", "a=x,z"], [], "--task: got 'a' twice"),
        ([], ["news"], "--retain: got 'news'; expected NAME=FILE, or the name of a --task"),
        (["maths=x,y"], ["math"], "did you mean 'maths'?"),
        ([], ["news=a,b"], "--retain: got 'news=a,b', expected NAME=FILE"),
        ([], ["news=a,steps=3"], "--retain news: unknown option 'steps'"),
    ],
)
def test_a_task_written_wrongly_is_refused(tasks, retain, message):
    with pytest.raises(UserError) as error:
        read_retained(retain, read_tasks(tasks))
    assert message in str(error.value)


def test_figures_of_an_update_are_exact_norms_and_what_a_merge_keeps():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 40, generator=generator)
    assert spectral_norm(matrix) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-2)
    change = torch.zeros(4, 4)
    change[0, 0], change[1, 1], change[2, 2] = 1.0, 1e-5, 1e-5
    base = torch.ones(4, 4)
    base[2, 2] = 1e-4  # there the same delta is seen
    found = figures(iter([Update("a", base, change), Update("b", base, 3 * change)]))
    assert found["update_spectral"] == pytest.approx(2.0) and found["update_frobenius"] == pytest.approx(2.0)
    assert found["visible_fraction"] == pytest.approx(4 / 6)


def test_work_that_comes_while_others_are_at_work_is_done():
    from collections import deque

    waiting, done = deque([3]), []
    with Pool(abs, processes=1) as pool:
        for item, result in pool.results(waiting):
            done.append(result)
            waiting.extend([item - 1] if item else [])
    assert done == [3, 2, 1, 0]


def test_keys_do_not_depend_on_the_order_of_settings():
    settings = row()["settings"]
    assert settings_key(json.loads(json.dumps(dict(reversed(settings.items()))))) == settings_key(settings)
