"""A rank that stops making progress is named, by the ranks that wait for it."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from scale_sft.distributed import heartbeat
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.heartbeat import Heartbeat
from scale_sft.distributed.sharding import Replicated


class Store:
    """A key-value store within this process."""

    def __init__(self):
        self.values, self.broken = {}, False

    def set(self, key, value):
        if self.broken:
            raise RuntimeError("Broken pipe")
        self.values[key] = value.encode()

    def get(self, key):
        if self.broken:
            raise RuntimeError("Connection reset by peer")
        return self.values[key]


@pytest.fixture
def ranks(monkeypatch):
    """(count, timeout_seconds) -> heartbeats of so many ranks in this process, and the verdicts they gave up with."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    made = []

    def make(count, timeout_seconds=0.2):
        store, verdicts = Store(), {}
        for rank in range(count):
            give_up = lambda verdict, rank=rank: verdicts.setdefault(rank, verdict)
            made.append(Heartbeat(store, rank, count, timeout_seconds, give_up))
        for one in made:
            one.start()
            one.watched = True
        return made, verdicts, store

    yield make
    for one in made:
        one.close()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "time-out"
        time.sleep(0.01)


def test_a_rank_behind_the_others_is_named(ranks):
    (first, second, third), verdicts, _ = ranks(3)
    for one in (first, second, third, first, third):
        one.mark()
    wait_for(lambda: 0 in verdicts and 2 in verdicts)
    assert "waiting for rank 1 (host" in verdicts[0] and "rank 0" not in verdicts[0] and "rank 2" not in verdicts[0]


def test_a_rank_without_sign_of_life_is_named(ranks):
    (_, second), verdicts, _ = ranks(2)
    second._stop.set()
    second._thread.join()
    wait_for(lambda: 0 in verdicts)
    assert verdicts[0].startswith("no sign of life from rank 1")


def test_its_last_words_are_quoted(ranks):
    (_, second), verdicts, _ = ranks(2)
    second.close("MemoryError: 40 GiB")
    wait_for(lambda: 0 in verdicts)
    assert "rank 1" in verdicts[0] and "ended with: MemoryError: 40 GiB" in verdicts[0]


def test_of_ranks_equally_far_the_one_that_does_not_wait_is_named(ranks, monkeypatch):
    (first, _), verdicts, _ = ranks(2)
    monkeypatch.setattr(
        heartbeat, "_place_of", lambda _: ("train.py:1 in train", threading.current_thread() is first._thread)
    )
    wait_for(lambda: 0 in verdicts)
    assert "waiting for rank 1" in verdicts[0] and "at train.py:1 in train" in verdicts[0]


def test_who_makes_progress_or_is_not_watched_is_left_alone(ranks):
    (first, second), verdicts, _ = ranks(2, timeout_seconds=0.3)
    second.watched = False
    for _ in range(30):
        first.mark()
        time.sleep(0.02)
    assert not verdicts


def test_a_store_that_is_gone_ends_the_beating_quietly(ranks):
    (first, _), verdicts, store = ranks(2)
    store.broken = True
    wait_for(lambda: not first._thread.is_alive())
    assert "is gone" in first.verdict() and not verdicts


def test_a_cluster_that_is_closed_has_stopped_its_heartbeat(ranks):
    """A thread that still beats while the interpreter ends aborts a process that has finished its work."""
    (mine, _), _, _ = ranks(2)
    beating = []
    accelerator = SimpleNamespace(end_training=lambda: beating.append(mine._thread.is_alive()))
    cpu = torch.device("cpu")
    Cluster(rank=0, size=2, device=cpu, heartbeat=mine, accelerator=accelerator, sharding=Replicated(cpu)).close()
    assert beating == [False]
