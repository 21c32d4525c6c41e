"""What an active entry costs, counted from the tensors of a real run on a bf16 base."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scale_sft.planning.footprint import candidate_bytes, estimated, facts_of, state_bytes
from scale_sft.spiel.schedules import Phase


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory, tokenizer):
    """A Llama whose rows are long enough to be no special case: 512 wide, of 2 layers."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("ag", {}, 20),
        ("static", {}, 20),
        ("ma", {}, 14.2),
        ("ag", {"moments": "int8"}, 16),
        ("ag", {"moments": "int8", "gradient_dtype": "bfloat16"}, 14),
        ("ag", {"moments": "int8", "gradient_dtype": "bfloat16", "delta_dtype": "bfloat16"}, 12),
        ("ma", {"gradient_dtype": "bfloat16"}, 12),
    ],
)
def test_state_costs_at_most_so_many_bytes_per_active_entry(session, wide_base, method, options, most):
    run = session(base=wide_base, dtype="bfloat16", method=method, density=0.02, **options)
    kept = run.tuning.state_bytes() | {"base values": run.resident.bytes}
    active = run.tuning.store.active
    assert kept["base values"] == 2 * active and kept["ages"] == active
    assert sum(kept.values()) / active <= most, kept
    # What is planned before a run is what it has then.
    shapes = {delta.name: delta.shape for delta in run.tuning.store}
    counts = {delta.name: delta.active for delta in run.tuning.store}
    planned = sum(state_bytes(run.inputs.config, shapes, counts, torch.bfloat16, 1).values())
    assert planned == pytest.approx(sum(kept.values()), rel=0.002)


@pytest.mark.parametrize("granularity", ["entry", "column"])
def test_candidates_cost_what_is_planned_for_them_and_are_gone_after(session, wide_base, granularity):
    run = session(base=wide_base, dtype="bfloat16", density=0.02, granularity=granularity)
    recorder, config = run.tuning.recorder, run.inputs.config
    counts = {delta.name: delta.active for delta in run.tuning.store}
    before = sum(run.tuning.state_bytes().values())
    recorder.begin_step(Phase.PROPOSE)
    for delta in run.tuning.store:
        recorder.record_product(delta.name, torch.randn(3, delta.shape[0]), torch.randn(3, delta.shape[1]))
    during = sum(run.tuning.state_bytes().values())
    planned = candidate_bytes(config, estimated(config.sparse, facts_of(config, run.inputs.model_config), counts))
    assert 0.85 * planned < during - before <= planned
    recorder.close_estimation()
    assert sum(run.tuning.state_bytes().values()) == before
