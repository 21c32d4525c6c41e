"""What a sync costs, measured: bytes in proportion to the density, and a row that the page shows."""

import torch

from scale_sft.bench import rows
from scale_sft.bench.sync import COLUMNS, Case, part, run


def test_a_sync_takes_bytes_in_proportion_to_the_density_and_shows_on_the_page(tmp_path) -> None:
    cases = [Case(base="demo", density=density, steps=2) for density in (0.01, 0.04)]
    found = rows.Results(tmp_path, "sync")
    for settings, result in run(cases):
        found.add(settings, **result)
        assert settings["parameters"] * torch.bfloat16.itemsize <= result["whole_bytes"]
        assert result["most_bytes"] <= 12 * settings["density"] * result["whole_bytes"]
        assert result["bytes"] <= 6.0 * settings["density"] * settings["parameters"] + 8000  # names and shapes
    (table,) = part(rows.read_rows(tmp_path, "sync")).tables
    assert [line[0] for line in table.rows] == ["demo, 0.8 M", "demo, 0.8 M"]
    assert all(len(line) == len(COLUMNS) for line in table.rows)
