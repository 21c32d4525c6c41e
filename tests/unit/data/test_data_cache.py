"""Tokenised once: who waits, who works, and when the work is done anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scale_sft.config.options import DataConfig
from scale_sft.data import cache as data_cache
from scale_sft.data.batches import BatchOrder
from scale_sft.data.cache import load_examples
from scale_sft.data.examples import Examples
from scale_sft.errors import UserError
from scale_sft.model.loss import IGNORED


@pytest.fixture
def built(monkeypatch):
    """Grows by one with every time that something is tokenised."""
    builds = []
    real = data_cache._build
    monkeypatch.setattr(data_cache, "_build", lambda *arguments: (builds.append(1), real(*arguments)))
    return builds


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b" * (n + 1)}) + "\n" for n in range(9)))
    return path


def load(source, tokenizer, tmp_path, limit=None, refresh=False, **options):
    config = DataConfig(**{"max_length": 12, "cache_dir": str(tmp_path / "cache"), **options})
    return load_examples(str(source), "train", tokenizer, config, limit, refresh=refresh)


def test_a_second_load_finds_the_work_done_and_gives_the_same(source, tokenizer, tmp_path, built):
    first, second = (load(source, tokenizer, tmp_path) for _ in range(2))
    assert len(built) == 1 and first.digest() == second.digest() and len(first) == len(second)
    assert (first.truncated, first.dropped) == (second.truncated, second.dropped) != (0, 0)


def test_what_the_tokens_depend_on_is_part_of_the_key(source, tokenizer, tmp_path, built):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    load(source, tokenizer, tmp_path)
    for number, change in enumerate([{"max_length": 11}, {"loss_on": "all"}, {"limit": 3}], start=2):
        load(source, tokenizer, tmp_path, **change)
        assert len(built) == number
    load(source, other, tmp_path)
    assert len(built) == 5
    load(source, tokenizer, tmp_path, preprocess_workers=1, packing=True)
    assert len(built) == 5
    source.write_text(source.read_text() * 2)
    assert len(load(source, tokenizer, tmp_path, max_length=100)) == 18


def test_refresh_tokenises_anew(source, tokenizer, tmp_path, built):
    for refresh in (False, True, True):
        load(source, tokenizer, tmp_path, refresh=refresh)
    assert len(built) == 3


def test_using_a_tokenizer_does_not_change_its_identity(tokenizer):
    before = data_cache.tokenizer_identity(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert data_cache.tokenizer_identity(tokenizer) == before


def test_several_processes_encode_the_same_in_the_same_order(source, tokenizer, tmp_path):
    one = load(source, tokenizer, tmp_path, preprocess_workers=1)
    two = load(source, tokenizer, tmp_path, preprocess_workers=2, refresh=True)
    assert one.digest() == two.digest()


def test_nothing_is_left_behind_by_a_failure_and_its_message_is_told_to_those_who_wait(source, tokenizer, tmp_path):
    source.write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(UserError, match="line 1"):
        load(source, tokenizer, tmp_path)
    left = sorted(path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert left == [".error"]


_WAITER = """
import sys
from scale_sft.config.options import DataConfig
from scale_sft.data import cache as data_cache
from transformers import AutoTokenizer
real = data_cache._build
data_cache._build = lambda *arguments: (print("worked", flush=True), real(*arguments))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = DataConfig(max_length=100, cache_dir=sys.argv[3])
print(len(data_cache.load_examples(sys.argv[2], "train", tokenizer, config, None)), flush=True)
"""


@pytest.mark.slow
def test_of_two_processes_one_works_and_both_get_the_examples(source, tiny_model, tmp_path):
    arguments = [sys.executable, "-c", _WAITER, str(tiny_model("llama")), str(source), str(tmp_path / "cache")]
    root = str(Path(__file__).parents[3])
    import os

    environment = os.environ | {"PYTHONPATH": root}
    running = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=110)[0].split() for process in running]
    assert sorted(outputs, key=len) == [["9"], ["worked", "9"]]


def test_a_damaged_cache_is_named(source, tokenizer, tmp_path):
    load(source, tokenizer, tmp_path)
    manifest = next((tmp_path / "cache").glob("*/manifest.json"))
    manifest.write_text("{")
    with pytest.raises(UserError, match="is damaged .* remove that folder"):
        load(source, tokenizer, tmp_path)


def test_examples_know_their_tokens_without_reading_them():
    ids, labels = [[1, 2, 3, 4], [5, 6]], [[IGNORED, 2, IGNORED, 4], [5, 6]]
    examples = Examples.from_lists(ids, labels, "made up")
    for n in range(2):
        assert [part.tolist() for part in examples.tokens(n)] == [ids[n], labels[n]]
    assert examples.target_tokens([0, 1, 1]) == 2 + 1 + 1
    assert examples.all_tokens([0, 1, 1]) == 8
    assert examples.lengths.dtype == np.int64


def test_the_order_depends_on_seed_and_epoch_and_can_begin_anywhere():
    order = BatchOrder(examples=10, global_batch_size=4, seed=1)
    batches = [order.batch(step) for step in range(1, 11)]
    assert BatchOrder(10, 4, 1).batch(7) == batches[6]
    seen = [n for batch in batches for n in batch]
    for epoch in range(4):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert seen[:10] != seen[10:20] and BatchOrder(10, 4, 2).batch(1) != batches[0]
