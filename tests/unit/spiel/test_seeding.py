import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from math import comb, sqrt
from pathlib import Path

import pytest
import torch

from scale_sft.spiel.seeding import random_indices

ROOT = Path(__file__).parents[3]
EACH = 12  # how often a set is expected where sets are counted


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        *(((8, 16), k) for k in (1, 40, 64, 65, 128)),
        ((300, 300), 100), ((3, 1), 2), ((1, 1), 1), ((46341, 46341), 9), ((2**20, 2**20), 9),
    ],
)  # fmt: skip
def test_random_indices_are_sorted_unique_and_inside(shape: tuple[int, int], k: int) -> None:
    for seed in range(5):
        indices = random_indices(shape, k, seed, "w")
        assert indices.shape == (k,)
        assert indices.dtype is (torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64)
        assert bool((indices[1:] > indices[:-1]).all())
        assert int(indices[0]) >= 0 and int(indices[-1]) < shape[0] * shape[1]


@pytest.mark.parametrize(("n", "k"), [(7, 1), (7, 2), (7, 3), (7, 4), (7, 6), (9, 3)])
def test_every_set_of_indices_is_equally_likely(n: int, k: int) -> None:
    """Pearson's statistic over all sets, within four standard deviations of its mean; the seeds are fixed."""
    sets = comb(n, k)
    draws = EACH * sets
    seen = Counter(tuple(random_indices((1, n), k, seed, "w").tolist()) for seed in range(draws))
    statistic = sum((seen[chosen] - EACH) ** 2 / EACH for chosen in combinations(range(n), k))
    assert abs(statistic - (sets - 1)) < 4 * sqrt(2 * (sets - 1))


@pytest.mark.parametrize(
    ("shape", "k"), [((11008, 4096), 901_775), ((3, 700_000_000), 600_000), ((60_000, 90_000), 400_000)]
)
def test_no_part_of_a_large_weight_is_favoured(shape: tuple[int, int], k: int) -> None:
    """Numbers below 2^32 mod n, or 2^31 mod n, come too often where random bits are reduced modulo n."""
    n = shape[0] * shape[1]
    indices = random_indices(shape, k, 0, "w")
    for bound in (n // 2, 2**31 % n, 2**32 % n, n // 64):
        share = bound / n
        assert abs(int((indices < bound).sum()) - k * share) < 4 * sqrt(k * share * (1 - share)) + 1
    low = Counter((indices % 8).tolist())
    assert all(abs(low[digit] - k / 8) < 4 * sqrt(k * 7 / 64) for digit in range(8))


def test_random_indices_depend_on_seed_and_name_and_nothing_else() -> None:
    draw = lambda seed, name: random_indices((100, 100), 50, seed, name).tolist()
    first = draw(1, "w")
    torch.manual_seed(123)
    torch.rand(7)
    assert draw(1, "w") == first
    assert draw(2, "w") != first and draw(1, "v") != first


def test_random_indices_are_the_same_in_another_process_and_on_another_machine() -> None:
    code = "from scale_sft.spiel.seeding import random_indices as r; print(r((100, 100), 9, 3, 'w').tolist())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    here = random_indices((100, 100), 9, 3, "w").tolist()
    assert run.stdout.strip() == str(here)
    assert here == [76, 354, 2052, 2439, 3450, 4367, 4652, 6188, 6903]


@pytest.mark.hardware
def test_the_entries_of_a_7b_model_take_five_seconds_of_one_core() -> None:
    """The largest of its weights, 901,775 of 45 M entries, in proportion to all 129.5 M entries."""
    random_indices((11008, 4096), 901_775, 0, "warm-up")
    began = time.process_time()
    for seed in range(8):
        random_indices((11008, 4096), 901_775, seed, "w")
    assert (time.process_time() - began) / (8 * 901_775) * 129_520_032 < 5
