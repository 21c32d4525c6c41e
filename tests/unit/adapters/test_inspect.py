"""What `inspect` says of an adapter is what is in it."""

import json
import re

import pytest
import torch
from adapter_factory import make_adapter
from click.testing import CliRunner

from scale_sft.adapters.format import Adapter
from scale_sft.adapters.inspection import inspect
from scale_sft.cli.main import main


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return make_adapter(tiny_model("llama"), tmp_path / "adapter", density=0.1)


def command(*arguments):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_counts_norms_and_the_most_moved_are_those_of_the_tensors(adapter) -> None:
    found, content = inspect(adapter, top=3), Adapter.load(adapter)
    every = torch.cat(list(content.deltas.values()))
    assert found.total.active == every.numel()
    assert found.total.norm == pytest.approx(float(every.norm()))
    assert sum(one.active for one in found.by_layer.values()) == every.numel()
    assert sum(one.active for one in found.by_kind.values()) == every.numel()
    assert set(found.by_layer) == {"0", "1"} and "q_proj" in found.by_kind
    best = every.abs().sort(descending=True).values[:3]
    assert [abs(entry["delta"]) for entry in found.moved] == pytest.approx(best.tolist())
    first = found.moved[0]
    columns = content.shapes[first["weight"]][1]
    place = content.indices[first["weight"]].tolist().index(first["row"] * columns + first["column"])
    assert float(content.deltas[first["weight"]][place]) == first["delta"]


def test_entries_in_one_row_are_seen_as_concentrated(tmp_path) -> None:
    info = {"base": "x", "base_hash": "0" * 64, "dtype": "float32"}
    indices = {"model.layers.0.up.weight": torch.arange(50, 100, dtype=torch.int32)}
    deltas = {"model.layers.0.up.weight": torch.ones(50)}
    Adapter(indices, deltas, {"model.layers.0.up.weight": (40, 50)}, info).save(tmp_path)
    total = inspect(tmp_path).total
    assert total.top_rows == 1.0 and total.top_columns == pytest.approx(1 / 50)


def test_it_is_shown_as_table_json_and_page(adapter, tmp_path) -> None:
    shown = command(adapter)
    assert "q_proj" in shown and "most moved weights" in shown and "method: ag" in shown
    document = json.loads(command(adapter, "--json"))
    assert document["total"]["active"] == sum(row["active"] for row in document["by_weight"].values())
    command(adapter, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3 and "q_proj" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)|<script|<link""", page), "the page needs other files"


def test_a_damaged_adapter_is_an_error(adapter, tmp_path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    result = CliRunner().invoke(main, ["inspect", str(adapter)])
    assert result.exit_code == 1 and "damaged or no safetensors" in result.output
