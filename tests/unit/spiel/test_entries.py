"""Stored entries are the flat indices they were made from, in fewer bytes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.spiel import indices as module
from scale_sft.spiel.deltas import SparseDelta
from scale_sft.spiel.indices import Entries, FlatEntries, Rows, bytes_of_entries, pieces
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


@pytest.mark.parametrize("width", [40_000, 65_537])
def test_entries_of_weights_that_int32_cannot_count_are_kept(width, piece):
    shape = (70_000, width)
    last = shape[0] * width - 1
    indices = torch.tensor([0, 1, 65_536, 3 * width, 2**31 - 1, 2**31, last - 1, last])
    entries = Entries(indices, shape)
    assert torch.equal(entries.flat(), indices) and entries.dtype is torch.int64
    entries.replace(torch.arange(8))
    assert torch.equal(entries.flat(), torch.arange(8))


def test_rows_without_entries_at_either_end_and_between_are_kept():
    indices = torch.tensor([21, 22, 23, 28, 29, 41, 42, 43, 44, 45, 46, 47, 48, 49, 51, 52, 53, 54, 55, 56, 57, 58, 59])
    assert torch.equal(Entries(indices, (10, 10)).flat().long(), indices)


def test_an_entry_costs_two_bytes_and_a_row_four():
    shape, count = (1024, 1024), 20_000
    entries = Entries(random_indices(shape, count, 0, "w"), shape)
    assert sum(tensor.nbytes for tensor in entries.tensors) == bytes_of_entries(count, 1025) == 2 * count + 4 * 1025


@pytest.mark.parametrize("limit", [1, 5, 30, 10**6])
def test_entries_of_all_weights_at_once_are_those_of_each(limit, monkeypatch):
    monkeypatch.setattr(module, "PIECE_ENTRIES", limit)
    counts = [min(17, shape[0] * shape[1]) for shape in SHAPES]
    each = [random_indices(shape, count, 0, "w") for shape, count in zip(SHAPES, counts, strict=True)]
    every = FlatEntries(Rows(SHAPES, torch.device("cpu")), counts)
    views = [every.of_weight(number, indices) for number, indices in enumerate(each)]
    assert all(torch.equal(view.flat().long(), indices) for view, indices in zip(views, each, strict=True))
    parts = list(every.parts())
    assert max(part.count for part in parts) <= limit and all(part.whole for part in every.groups())
    assert torch.equal(torch.cat([every.flat(part).long() for part in parts]), torch.cat(each))
    for part in parts:
        assert bool((every.joined(part).diff() > 0).all())
    rows, columns = (torch.cat(found) for found in list(zip(*every.coordinates(), strict=True))[1:])
    for number, (shape, indices) in enumerate(zip(SHAPES, each, strict=True)):
        entries = slice(every.starts[number], every.starts[number + 1])
        assert torch.equal(rows[entries] - every.rows.starts[number], indices // shape[1])
        assert torch.equal(columns[entries] - every.rows.first_columns[number], indices % shape[1])
    groups = list(every.groups([0, 1, 3, 4, 9], 17))
    assert [number for group in groups for number in group.numbers] == [0, 1, 3, 4, 9]


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
