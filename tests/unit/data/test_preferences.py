"""Pairs of answers and marked answers, from all the shapes in which data hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scale_sft.config.options import DataConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.preference_batches import Layout, PreferenceBatches
from scale_sft.errors import UserError

U, A, S = ((lambda text, role=role: {"role": role, "content": text}) for role in ("user", "assistant", "system"))


@pytest.fixture
def prefer(tokenizer, put, tmp_path):
    """(rows, kind="pairs", query="", option=value) -> examples."""

    def read(rows, kind="pairs", query="", **options):
        path = put("rows.jsonl", rows)
        config = DataConfig(**{"max_length": 200, "cache_dir": str(tmp_path / "cache"), **options})
        return load_examples(f"{path}{query}", "train", tokenizer, config, None, kind=kind)

    return read


@pytest.fixture
def shown(tokenizer):
    """(examples, sequence) -> its text, and the part that counts."""

    def get(examples, number):
        ids, labels = examples.sequence(number)
        return tokenizer.decode(ids), tokenizer.decode(ids[labels != -100])

    return get


TEXT = ("<s>Q: 2+2? A: 4</s>", "4</s>", "<s>Q: 2+2? A: 5</s>", "5</s>")
TURNS = ("<s>user:2+2?</s><s>assistant:4</s>", "4</s>", "<s>user:2+2?</s><s>assistant:5</s>", "5</s>")
SYSTEM = tuple(f"<s>system:Be brief.</s>{text}" if n % 2 == 0 else text for n, text in enumerate(TURNS))

ROWS = {
    "texts": ({"prompt": "Q: 2+2? A: ", "chosen": "4", "rejected": "5"}, "", TEXT),
    "texts that begin alike": ({"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"}, "",
                               (TEXT[0], " 4</s>", TEXT[2], " 5</s>")),
    "turns": ({"prompt": [U("2+2?")], "chosen": [A("4")], "rejected": [A("5")]}, "", TURNS),
    "a text and turns": ({"prompt": "2+2?", "chosen": [A("4")], "rejected": [A("5")]}, "", TURNS),
    "whole conversations": ({"chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")]}, "", TURNS),
    "the hub's UltraFeedback": ({"prompt": "2+2?", "chosen": [U("2+2?"), A("4")], "rejected": [U("2+2?"), A("5")],
                                 "messages": [U("2+2?"), A("4")], "score_chosen": 9.0}, "", TURNS),
    "a system prompt in a column": ({"system": "Be brief.", "prompt": [U("2+2?")], "chosen": [A("4")],
                                     "rejected": [A("5")]}, "", SYSTEM),
    "a system prompt in both": ({"chosen": [S("Be brief."), U("2+2?"), A("4")],
                                 "rejected": [S("Be brief."), U("2+2?"), A("5")]}, "", SYSTEM),
    "a system prompt in the prompt alone": ({"prompt": [S("Be brief."), U("2+2?")], "chosen": [U("2+2?"), A("4")],
                                             "rejected": [U("2+2?"), A("5")]}, "", SYSTEM),
    "a system prompt in both sides alone": ({"prompt": "2+2?", "chosen": [S("Be brief."), A("4")],
                                             "rejected": [S("Be brief."), A("5")]}, "", SYSTEM),
    "usual names": ({"question": "Q: 2+2? A: ", "chosen_response": "4", "rejected_response": "5"}, "", TEXT),
    "named": ({"ask": "Q: 2+2? A: ", "good": "4", "bad": "5"}, "?prompt=ask&chosen=good&rejected=bad", TEXT),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_both_sides_of_a_pair(prefer, shown, case):
    row, query, expected = ROWS[case]
    examples = prefer([row], query=query)
    assert (*shown(examples, 0), *shown(examples, 1)) == expected
    assert (len(examples), examples.dropped, examples.drops) == (1, 0, {})


def test_earlier_answers_of_a_conversation_do_not_count(prefer, shown):
    begin = [U("2+2?"), A("4"), U("3+3?")]
    examples = prefer([{"chosen": [*begin, A("6")], "rejected": [*begin, A("7")]}])
    assert [shown(examples, n)[1] for n in (0, 1)] == ["6</s>", "7</s>"]


def test_what_cannot_be_learned_from_is_dropped_whole_and_counted_by_its_reason(prefer, shown):
    rows = [
        {"prompt": "a ", "chosen": "b", "rejected": "b"},
        {"prompt": "a ", "chosen": "", "rejected": "b"},
        {"prompt": [U("a")], "chosen": [A("")], "rejected": [A("b")]},
        {"prompt": "a" * 40, "chosen": "b", "rejected": "c"},
        {"prompt": "kept ", "chosen": "b", "rejected": "c"},
        {"prompt": "", "chosen": "b" * 24 + "x", "rejected": "b" * 24 + "y"},
    ]
    examples = prefer(rows, max_length=20)
    assert len(examples) == 1 and shown(examples, 0)[1] == "b</s>"
    assert examples.drops == {"an answer is empty": 2, "both sides are equal": 2, "max_length cuts an answer away": 1}
    assert examples.dropped == 5
    with pytest.raises(UserError, match="no example to learn from is left, all are dropped: 2 because an answer"):
        prefer(rows[1:3])


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "pairs", "expected the fields chosen and rejected.*got prompt, completion"),
        ({"prompt": "a", "completion": "b"}, "marked", "expected the fields prompt, completion and label"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft", "got pairs of answers.*Fix: --objective dpo"),
        ({"chosen": [A("b")], "rejected": [A("c")]}, "pairs", "no field 'prompt', and both sides have no beginning"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "pairs", "line 1: field 'chosen' is int, expected text or"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "pairs", "line 1: field 'rejected' is missing"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "marked", "line 1: field 'label' is 'good', expected tr"),
    ],
)  # fmt: skip
def test_broken_rows_are_named_with_what_was_expected(prefer, row, kind, message):
    with pytest.raises(UserError, match=message):
        prefer([row], kind=kind)


def test_marked_answers_and_pairs_make_marked_answers(prefer, shown):
    rows = [{"prompt": "a ", "completion": "b", "label": True}, {"prompt": "c ", "completion": "dd", "label": 0}]
    examples = prefer(rows, "marked")
    assert examples.good.tolist() == [True, False]
    assert [shown(examples, n) for n in (0, 2)] == [("<s>a b</s>", "b</s>"), ("<s>c dd</s>", "dd</s>")]
    assert [shown(examples, n) for n in (1, 3)] == [("<s>a dd</s>", "dd</s>"), ("<s>c b</s>", "b</s>")], "mismatched"
    flipped = prefer([{**row, "label": not row["label"]} for row in rows], "marked")
    assert flipped.digest() != examples.digest()
    pairs = prefer([{"prompt": "a ", "chosen": "b", "rejected": "c"}], "marked")
    assert [len(found.right_answers()) for found in (pairs, examples, flipped)] == [1, 1, 1]
    assert flipped.right_answers().tokens(0)[0].tolist() == flipped.tokens(1)[0].tolist()
    assert pairs.good.tolist() == [True, False] and shown(pairs, 2) == ("<s>a c</s>", "c</s>")


def test_a_mismatched_answer_is_one_to_another_prompt(prefer, shown):
    pairs = prefer([{"prompt": f"{ask} ", "chosen": f"{ask}+", "rejected": f"{ask}-"} for ask in "abc"], "marked")
    own = {n: shown(pairs, n)[1] for n in range(0, 12, 2)}
    assert list(own.values()) == [f"{ask}{mark}</s>" for ask in "abc" for mark in "+-"]
    assert [shown(pairs, n)[1] for n in range(1, 12, 2)] == ["c-</s>", "c-</s>", "a-</s>", "a-</s>", "b-</s>", "b-</s>"]


def test_packed_rows_of_mismatched_answers_are_as_long_as_they_may_be_at_most(prefer):
    """Example 6 is short, and its mismatched answer, that of example 5, long."""
    rows = [{"prompt": f"{n} ", "completion": "a" * (20 if n in (1, 5) else 1), "label": n < 4} for n in range(8)]
    batches = PreferenceBatches(prefer(rows, "marked"), Layout(row_tokens=32), 258, torch.device("cpu")).mismatched()
    found = list(batches.of_rank(range(8), rank=0, world_size=1, micro_batch_size=1))
    assert max(batch.positions for batch in found) <= 32
    assert sorted(sequence for batch in found for sequence in batch.sequences) == list(range(1, 16, 2))


def test_a_prompt_of_text_stays_in_front_of_answers_that_begin_alike_without_it(prefer, shown):
    begin = [A("4?"), U("sure?")]
    examples = prefer([{"prompt": "2+2?", "chosen": [*begin, A("4")], "rejected": [*begin, A("5")]}])
    text = "<s>user:2+2?</s><s>assistant:4?</s><s>user:sure?</s><s>assistant:"
    assert [shown(examples, n)[0] for n in (0, 1)] == [f"{text}4</s>", f"{text}5</s>"]


def test_a_pair_shares_its_prompt_but_the_token_that_both_sides_predict_from(prefer):
    examples = prefer([{"prompt": "abcd", "chosen": "xyz", "rejected": "xw"}])
    assert examples.shared_tokens(0) == 4  # <s> a b c
    batches = PreferenceBatches(examples, Layout(row_tokens=64, shared=True), 258, torch.device("cpu"))
    batch = batches.packed([[0]])
    text = bytes(batch.inputs["input_ids"][0].clamp(max=255).tolist()[1:]).replace(b"\xff", b".")
    assert len(text) == len(b"abc" + b"dxyz." + b"dxw.") and batches.lengths.tolist() == [13]
    assert batch.inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7]
    assert batch.places.tolist() == [4, 5, 6, 7, 9, 10, 11] and batch.counts == [4, 3]
    seen = batch.inputs["attention_mask"][0, 0]
    assert seen[11].nonzero().flatten().tolist() == [0, 1, 2, 3, 9, 10, 11], "the prompt and its own side"
    assert seen[8].nonzero().flatten().tolist() == list(range(9))


def test_the_cache_tells_kinds_apart_and_keeps_the_keys_of_sft(prefer, pairs_file, tokenizer, tmp_path):
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "c", "completion": "b", "label": 1}] * 2
    kinds = {kind: prefer(rows, kind) for kind in ("sft", "pairs", "marked")}
    assert {kind: len(found) for kind, found in kinds.items()} == {"sft": 2, "pairs": 2, "marked": 2}
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 3


def test_subsets_keep_both_sides(prefer, shown):
    examples = prefer([{"prompt": f"{n} ", "chosen": "a", "rejected": "b"} for n in range(4)])
    some = examples.subset([3, 1])
    assert [shown(some, n)[0] for n in range(4)] == ["<s>3 a</s>", "<s>3 b</s>", "<s>1 a</s>", "<s>1 b</s>"]
    assert np.array_equal(some.lengths, [10, 10]) and some.shared_tokens(0) == 2
