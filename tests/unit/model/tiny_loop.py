"""A plain loop over a tiny model with deltas."""

import torch

SCHEDULE = {"method": "ag", "update_interval_steps": 3, "estimation_steps": 2, "total_steps": 9, "density": 0.05}


def batch(number: int, rows: int = 4) -> dict:
    ids = torch.randint(0, 256, (rows, 12), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def train(model, optimizer, first: int, last: int, micro: int = 1) -> None:
    for number in range(first, last + 1):
        for part in range(micro):
            rows = {key: value.chunk(micro)[part] for key, value in batch(number).items()}
            (model(**rows).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
