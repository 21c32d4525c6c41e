"""Memory is counted where it is used. In processes of their own: one that has freed much reuses that first."""

import subprocess
import sys

MIB = 1 << 20


def measured(code: str) -> int:
    """Run `code` in a fresh process; returns the number of bytes that it prints."""
    head = "import torch; from scale_sft.model.memory import PeakMemory, memory_bytes; cpu = torch.device('cpu')\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=100, check=True)
    return int(done.stdout)


def test_a_peak_is_seen_although_it_is_gone_at_the_end():
    added = measured(
        f"with PeakMemory(cpu) as peak:\n"
        f"    held = torch.ones({48 * MIB // 4})\n"
        f"    for _ in range(50):\n"
        f"        held.sum()\n"
        f"    del held\n"
        f"print(peak.added)"
    )
    assert 40 * MIB < added < 120 * MIB


def test_memory_of_this_process_grows_with_what_it_holds():
    grown = measured(
        f"before = memory_bytes(cpu)\nheld = torch.ones({64 * MIB // 4})\nprint(memory_bytes(cpu) - before)"
    )
    assert grown > 50 * MIB
