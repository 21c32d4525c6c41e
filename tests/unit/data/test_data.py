import json
import random

import pytest
import torch

from scale_sft.config.options import DataConfig
from scale_sft.data.batches import BatchOrder
from scale_sft.data.cache import load_examples
from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import by_length, collate, micro_batches
from scale_sft.errors import UserError
from scale_sft.model.loss import IGNORED


@pytest.fixture
def load(tokenizer, tmp_path):
    """(rows or text, option=value, ...) -> examples read from a file of them."""

    def get(content, name: str = "data.jsonl", **options) -> Examples:
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_examples(
            str(tmp_path / name), "train", tokenizer, DataConfig(**{"max_length": 64, **options}), None
        )

    return get


def learned(examples: Examples, tokenizer, n: int = 0) -> str:
    """The text of the tokens that count."""
    return tokenizer.decode([label for label in examples.tokens(n)[1] if label != IGNORED])


def test_of_a_prompt_and_its_completion_the_completion_and_its_end_count(load, tokenizer) -> None:
    examples = load([{"prompt": "2 + 3 = ", "completion": "5"}])
    assert tokenizer.decode(examples.tokens(0)[0]) == "<s>2 + 3 = 5</s>"
    assert learned(examples, tokenizer) == "5</s>"


def test_with_loss_on_all_every_token_counts(load, tokenizer) -> None:
    assert learned(load([{"prompt": "a", "completion": "b"}], loss_on="all"), tokenizer) == "<s>ab</s>"


def test_every_assistant_turn_and_its_end_count(load, tokenizer) -> None:
    turn = lambda role, content: {"role": role, "content": content}
    rows = [{"messages": [turn("user", "a?"), turn("assistant", "b"), turn("user", "c?"), turn("assistant", "d")]}]
    examples = load(rows)
    assert tokenizer.decode(examples.tokens(0)[0]).startswith("<s>user:a?</s><s>assistant:b</s>")
    assert learned(examples, tokenizer) == "b</s>d</s>"


def test_long_examples_are_cut_at_the_end(load, tokenizer) -> None:
    examples = load([{"prompt": "ab", "completion": "cdefgh"}], max_length=6)
    assert tokenizer.decode(examples.tokens(0)[0]) == "<s>abcde"
    assert learned(examples, tokenizer) == "cde"


def test_target_tokens_leave_out_the_first_of_a_sequence() -> None:
    examples = Examples.from_lists([[1, 2, 3], [4, 5]], [[1, 2, 3], [IGNORED, 5]], "x")
    assert examples.target_tokens([0]) == 2 and examples.target_tokens([0, 1, 1]) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", compl', "line 2: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n\n\nhello\n', "line 4: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n[1, 2]\n', "line 2: expected a JSON object, got list"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n', "2: field 'prompt' is int"),
        ('{"question": "a", "answer": "b"}\n', "expected the fields messages; prompt and completion; "),
        ('{"prompt": "a", "completion": ""}\n', "line 1: no token to learn from"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n', "line 2: field 'completion'"),
        ('{"prompt": "a"}\n', "expected the fields messages; prompt and completion; "),
        ('{"messages": []}\n', "line 1: "),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: no token to learn from"),
        ('{"messages": [{"role": "user", "text": "a"}]}\n', "line 1: the content of turn 1 (user) is NoneType"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_one_error_that_says_where(load, text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load(text)
    assert expected in str(error.value) and "data.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tokenizer, tmp_path) -> None:
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(UserError, match="data: ") as error:
            load_examples(str(path), "train", tokenizer, DataConfig(), None)
        assert str(path) in str(error.value)


def test_messages_need_a_chat_template(load, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        load([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])


def test_every_epoch_shows_each_example_once_in_an_order_of_its_own() -> None:
    order = BatchOrder(10, 4, seed=3, total_examples=30)
    seen = [n for step in range(1, order.steps() + 1) for n in order.batch(step)]
    assert order.steps() == 8 and len(seen) == 30
    epochs = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_and_not_on_what_was_asked_before() -> None:
    first = [BatchOrder(50, 8, seed=1).batch(step) for step in (1, 20, 7)]
    again = BatchOrder(50, 8, seed=1)
    assert [again.batch(step) for step in (7, 20, 1)] == first[::-1]
    assert BatchOrder(50, 8, seed=2).batch(1) != first[0]


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_into_ranks_and_micro_batches_covers_the_batch_once_in_equally_many_micro_steps(seed: int) -> None:
    rng = random.Random(seed)
    batch = rng.sample(range(100), rng.randint(1, 24))
    world, size = rng.randint(1, 5), rng.choice([None, 1, 2, 5])
    first = rng.choice([None, 1, min(3, len(batch)), len(batch)])
    cuts = [micro_batches(batch, rank, world, size, first) for rank in range(world)]
    assert len({len(cut) for cut in cuts}) == 1
    members = [n for cut in cuts for part in cut for n in part if n is not None]
    assert sorted(members) == sorted(batch)
    if first:
        proposing = [n for cut in cuts for n in cut[0] if n is not None]
        assert sorted(proposing) == sorted(batch[:first])


def test_sequences_are_padded_on_the_right_and_absent_ones_count_nothing() -> None:
    examples = Examples.from_lists([[1, 2, 3], [4, 5]], [[IGNORED, 2, 3], [IGNORED, 5]], "x")
    batch = collate(examples, [1, 0, None], 9, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[4, 5, 9], [1, 2, 3], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, IGNORED], [IGNORED, 2, 3], [IGNORED] * 3]


def test_grouping_by_length_loses_no_example() -> None:
    examples = Examples.from_lists(
        [[0] * length for length in (3, 9, 2, 9, 4)], [[0] * length for length in (3, 9, 2, 9, 4)], "x"
    )
    assert list(by_length(examples, 2)) == [[1, 3], [4, 0], [2]]
