"""Memory is counted where it is used."""

import torch

from scale_sft.model.memory import PeakMemory, memory_bytes

MIB = 1 << 20


def test_a_peak_is_seen_although_it_is_gone_at_the_end():
    with PeakMemory(torch.device("cpu")) as peak:
        held = torch.ones(48 * MIB // 4)
        for _ in range(50):
            held.sum()
        del held
    assert 40 * MIB < peak.added < 120 * MIB


def test_memory_of_this_process_grows_with_what_it_holds():
    before = memory_bytes(torch.device("cpu"))
    held = torch.ones(64 * MIB // 4)
    assert memory_bytes(torch.device("cpu")) - before > 50 * MIB
    del held
