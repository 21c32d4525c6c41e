"""One step on pairs: all contestants train on the same tokens, with as many parameters, against the same reference."""

import math
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from scale_sft.bench.page import write_page
from scale_sft.bench.rows import read_rows
from scale_sft.bench.step import pair_contestants, pair_race, race
from scale_sft.bench.step.pair_contestants import PAIR_CONTESTANTS, Preferring, Trl
from scale_sft.bench.step.pair_race import PairRace
from scale_sft.bench.step.pairs import PairBatches
from scale_sft.bench.workload import Base, Case
from scale_sft.errors import UserError

CPU = torch.device("cpu")
WITH_TRL = pytest.mark.skipif(not (find_spec("trl") and find_spec("peft")), reason="TRL or PEFT is not installed")


@pytest.fixture(autouse=True)
def one_peak(monkeypatch):
    monkeypatch.setattr(pair_race, "PEAKS", 1)


@pytest.fixture
def case(tiny_model):
    """(setting=value, ...) -> a case of two pairs of 2 x 12 tokens on the tiny Llama."""
    return lambda **settings: Case(
        **{"base": str(tiny_model("llama")), "dtype": "float32", "length": 12, "micro_batch": 4, "rank": 2, **settings}
    )


@pytest.fixture
def run(tmp_path):
    """(cases, names) -> the rows of a race of one round."""

    def measure(cases, names=None):
        effort = race.Effort(rounds=1, warm_up_steps=0, breakdown=False, together=True)
        return race.run(cases, names, effort, tmp_path, Console(quiet=True), PairRace)

    return measure


def batches_of(base):
    return PairBatches(base.case, base.model_config.vocab_size, CPU)


@WITH_TRL
def test_every_contestant_has_a_row_and_a_line_on_the_page(run, case, tmp_path):
    rows = run([case()])
    assert [row["settings"]["contestant"] for row in rows] == list(PAIR_CONTESTANTS)
    assert rows == read_rows(tmp_path, "dpo")
    for row in rows:
        result = row["result"]
        ratios = [result["relative"][peer]["median"] for peer in ("ours-sft", "trl-dpo")]
        assert all(math.isfinite(value) and value > 0 for value in [*result["seconds"], *ratios])
        assert result["peak_bytes"] >= 0
    assert len({row["result"]["trainable"] for row in rows}) == 1
    tokens = {row["settings"]["contestant"]: row["result"]["tokens"] for row in rows}
    assert tokens.pop("ours-dpo-packed") == 2 * (2 * 12 - 5) and set(tokens.values()) == {4 * 12}
    page = write_page(tmp_path).read_text()
    assert all(f"<td>{name}</td>" in page for name in PAIR_CONTESTANTS) and "prompts of 6 tokens" in page


@WITH_TRL
def test_trl_trains_on_our_tokens_and_its_reference_is_ours(case):
    base = Base(case(), CPU)
    batches = batches_of(base)
    theirs, ours = Trl(base, batches, precomputed=True), Preferring(base, batches)
    table = ours.objective._table.view(-1, 2)
    for number, row in enumerate(theirs.trainer.train_dataset):
        for side, name in enumerate(("chosen", "rejected")):
            tokens, labels = batches.pairs.sequence(2 * number + side)
            assert row["prompt_ids"] + row[f"{name}_ids"] == tokens.tolist()
            assert row[f"{name}_ids"] == labels[labels != -100].tolist()
            assert row[f"ref_{name}_logps"] == pytest.approx(table[number, side].item(), rel=1e-5)
    for trainer in (theirs, ours):  # a new adapter changes nothing, a trained one does
        first, second = (trainer.step(batches, 0) for _ in range(2))
        assert first == pytest.approx(math.log(2), rel=1e-5) and second < first


def test_sft_trains_on_the_answers_of_the_same_sequences(case):
    batches = batches_of(Base(case(), CPU))
    ids = torch.stack([torch.from_numpy(batches.pairs.sequence(number)[0]) for number in range(4)])
    found = batches.take(0)
    assert torch.equal(found["input_ids"], ids) and found["attention_mask"].all()
    assert batches.target_tokens == 4 * 6 == batches.pairs.target_tokens([0, 1])
    assert all((ids[n, :6] == ids[n + 1, :6]).all() and ids[n, 6] != ids[n + 1, 6] for n in (0, 2))


def test_without_trl_the_command_leaves_it_out_and_says_why(run, case, monkeypatch, tmp_path):
    from scale_sft.cli.main import main

    monkeypatch.setattr(pair_contestants, "find_spec", lambda name: None if name == "trl" else True)
    arguments = f"--objective dpo --base {case().base} --rank 2 --dtype float32 --length 8 --micro-batch 2 --rounds 1"
    result = CliRunner().invoke(main, ["bench", "step", *arguments.split(), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "without trl-dpo: it needs trl: pip install 'scale_sft[trl]'" in result.output
    found = [row["settings"] for row in read_rows(tmp_path, "dpo")]
    assert [settings["contestant"] for settings in found] == [n for n in PAIR_CONTESTANTS if n.startswith("ours")]
    assert {settings["objective"] for settings in found} == {"dpo"}
    with pytest.raises(UserError, match="contestants: trl-dpo takes part in no case: it needs trl"):
        run([case()], ["trl-dpo"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"micro_batch": 3}, "micro_batch_size: got 3 .* Fix: 4"), ({"length": 3}, "max_length: got 3 .*at least 4")],
)
def test_a_case_without_whole_pairs_is_refused(run, case, settings, message):
    with pytest.raises(UserError, match=message):
        run([case(**settings)])
