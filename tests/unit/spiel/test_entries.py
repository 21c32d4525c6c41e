"""Packed entries are the flat indices they were made from, in fewer bytes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.spiel import indices as module
from scale_sft.spiel.deltas import SparseDelta
from scale_sft.spiel.indices import Entries, bytes_of_entries, pieces
from scale_sft.spiel.seeding import random_indices

SHAPES = [(1, 1), (1, 40), (40, 1), (7, 5), (64, 128), (128, 64), (3, 65536), (3, 65537), (2, 70000), (300, 400)]


@pytest.fixture(params=[None, 7], ids=["whole", "in pieces"])
def piece(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "PIECE_ENTRIES", request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.5, 1.0])
def test_entries_give_back_the_indices_they_were_made_from(shape, density, piece):
    count = min(20_000, max(1, int(density * shape[0] * shape[1])))
    indices = random_indices(shape, count, 0, "w")
    entries = Entries(indices, shape)
    assert torch.equal(entries.flat().long(), indices) and entries.flat().dtype is torch.int32
    found = [
        torch.cat(parts) for parts in zip(*((row, column) for _, row, column in entries.coordinates()), strict=False)
    ]
    assert torch.equal(found[0], indices // shape[1]) and torch.equal(found[1], indices % shape[1])
    starts, columns = entries.csr()
    rows = torch.repeat_interleave(torch.arange(shape[0]), starts.diff().long())
    assert torch.equal(rows * shape[1] + columns.long(), indices)
    assert torch.equal(entries.flat().long(), indices) and entries.flat().dtype is torch.int32  # from rows now


@pytest.mark.parametrize("first", [0, 65_535, 65_536, 200_000])
@pytest.mark.parametrize("gap", [1, 65_535, 65_536, 65_537, 131_072, 10_000_000])
def test_gaps_of_any_width_are_kept(first, gap, piece):
    shape = (70_000, 40_000)  # more entries than int32 counts
    indices = torch.arange(60) * gap + first
    indices[40:] += 3 * gap
    assert torch.equal(Entries(indices, shape).flat(), indices)
    last = shape[0] * shape[1] - 1
    assert torch.equal(Entries(torch.tensor([first, last]), shape).flat(), torch.tensor([first, last]))


def test_rows_without_entries_at_either_end_and_between_are_kept():
    indices = torch.tensor([21, 22, 23, 28, 29, 41, 42, 43, 44, 45, 46, 47, 48, 49, 51, 52, 53, 54, 55, 56, 57, 58, 59])
    entries = Entries(indices, (10, 10))
    entries.csr()
    assert torch.equal(entries.flat().long(), indices)


def test_an_entry_costs_two_bytes_and_as_rows_its_share_of_a_row_more():
    shape, count = (1024, 1024), 20_000
    entries = Entries(random_indices(shape, count, 0, "w"), shape)
    kept = lambda: sum(tensor.nbytes for tensor in entries.tensors)
    assert kept() == bytes_of_entries(count) == 2 * count
    entries.csr()
    assert kept() == 2 * count + 4 * 1025


def test_no_int64_tensor_as_long_as_the_entries_is_made():
    class Longest(TorchDispatchMode):
        longest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype is torch.int64:
                self.longest = max(self.longest, result.numel())
            return result

    shape, count = (1024, 2048), 600_000
    delta = SparseDelta("w", shape, Entries(random_indices(shape, count, 0, "w").int(), shape), None, None)
    with Longest() as seen:
        delta.indices = delta.indices
        for _ in delta.entries.coordinates():
            pass
        delta.entries.csr()
        assert delta.indices.dtype is torch.int32
    assert 0 < seen.longest < count


def test_pieces_cover_everything_once():
    assert [(p.start, p.stop) for p in pieces(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert not list(pieces(0))
