"""The loss that balances experts is the model's own, whatever micro-batches a global batch is cut into."""

import pytest
import torch

from scale_sft.config.loading import load
from scale_sft.errors import UserError
from scale_sft.model.loading import enable_checkpointing
from scale_sft.model.router_loss import router_loss_of
from scale_sft.model.targets import attach_taps, find_targets
from scale_sft.objective.tokens import TokenShare
from tests.unit.model.mixtures import mixture

IDS = torch.arange(48).mul(7).remainder(61).add(3).view(4, 12)


def batch(rows: slice) -> dict[str, torch.Tensor]:
    labels = IDS[rows].clone()
    labels[:, :3] = -100
    return {"input_ids": IDS[rows], "attention_mask": torch.ones_like(IDS[rows]), "labels": labels}


def step(model, cuts: list[slice], wanted: str = "true"):
    sums: dict[str, torch.Tensor] = {}
    targets = find_targets(model, None)
    attach_taps(targets, lambda name, a, b: sums.update({name: sums.get(name, 0) + a.t() @ b}))
    share = TokenShare(4 * 9, IDS.numel(), router_loss_of(model, wanted))
    total = 0.0
    for cut in cuts:
        loss = share.loss_sum(model, batch(cut))
        loss.backward()
        total += loss.item()
    return total, share.counts(share.sums), sums


@pytest.mark.parametrize(("kind", "checkpointing"), [("mixtral", False), ("gpt_oss", False), ("qwen3_moe", True)])
def test_the_loss_and_its_gradients_are_those_of_the_models_class(kind, checkpointing):
    model = mixture(kind, router_aux_loss_coef=0.5).train()
    if checkpointing:
        enable_checkpointing(model)
    found = model(**batch(slice(4)), output_router_logits=True)
    found.loss.backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.requires_grad_(False).zero_grad()
    loss, counts, sums = step(model, [slice(4)])
    assert loss == pytest.approx(found.loss.item(), abs=1e-6)
    assert counts["router_loss"] == pytest.approx(found.aux_loss.item(), abs=1e-6)
    assert torch.allclose(sums["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-7)


def test_micro_batches_add_up_by_their_target_tokens():
    model = mixture("mixtral", router_aux_loss_coef=0.5).requires_grad_(False).train()
    cuts = [slice(0, 1), slice(1, 4)]
    loss, counts, _ = step(model, cuts)
    with torch.no_grad():
        parts = [model(**batch(cut), output_router_logits=True) for cut in cuts]
    assert loss == pytest.approx(parts[0].loss.item() / 4 + 3 * parts[1].loss.item() / 4, abs=1e-6)
    assert counts["router_loss"] == pytest.approx(parts[0].aux_loss.item() / 4 + 3 * parts[1].aux_loss.item() / 4)


def test_it_is_part_of_the_loss_if_the_option_or_the_configuration_says_so():
    plain, asking = mixture("mixtral"), mixture("mixtral", output_router_logits=True)
    assert router_loss_of(plain, "auto") is None and router_loss_of(asking, "auto") is not None
    assert router_loss_of(plain, "true") is not None and router_loss_of(asking, "false") is None
    assert router_loss_of(mixture("deepseek_v3"), "auto") is None
    with pytest.raises(UserError, match="router_aux_loss: got true, expected false, as DeepseekV3ForCausalLM"):
        router_loss_of(mixture("deepseek_v3"), "true")


@pytest.mark.parametrize(("given", "read"), [(True, "true"), ("false", "false"), ("auto", "auto")])
def test_the_option_takes_truth_values_and_auto(given, read):
    assert load("demo", {"router_aux_loss": given}).objective.router_aux_loss == read
