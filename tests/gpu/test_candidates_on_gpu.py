"""Candidates chosen over several ranks on a GPU: the entries that ranks on a CPU choose."""

import pytest
import torch

from scale_sft.distributed.candidates import select_candidates
from tests.candidate_cases import KINDS, summands
from tests.thread_ranks import on_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_chooses_what_a_cpu_chooses(kind: str) -> None:
    parts = summands(kind, 4, 100_003, torch.bfloat16)
    found = {
        device: on_threads(4, lambda r, d=device: select_candidates(r, parts[r.rank].to(d), 2_000).cpu(), device)
        for device in ("cpu", "cuda")
    }
    for chosen in found["cuda"]:
        assert torch.equal(chosen, found["cpu"][0])
