"""PEFT models as trainers: whichever adapter is active, a receiver ends with the bits of the model."""

import pytest
import torch
from trainers import load

peft = pytest.importorskip("peft", "0.21")

from scale_sft import sync  # noqa: E402
from scale_sft.errors import UserError  # noqa: E402
from scale_sft.peft import SpielConfig  # noqa: E402

IDS = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama", "bfloat16")


def config(**options) -> SpielConfig:
    return SpielConfig(
        **{"density": 0.05, "total_steps": 12, "update_interval_steps": 2, "estimation_steps": 1, **options}
    )


def steps(model, count: int) -> None:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same_logits(receiver, model) -> bool:
    with torch.no_grad():
        return torch.equal(receiver(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_receiver_follows_training_other_adapters_and_merging(base) -> None:
    model, receiver = peft.get_peft_model(load(base), config()), load(base)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.apply(receiver, sync.changed(model).to_bytes())
        assert same_logits(receiver, model)
    model.add_adapter("other", config(target_modules=["q_proj"], seed=3))
    model.set_adapter("other")
    steps(model, 2)
    for change in (lambda: None, model.merge_adapter, lambda: (model.unmerge_adapter(), model.set_adapter("default"))):
        change()
        sync.apply(receiver, sync.changed(model).to_bytes())
        assert same_logits(receiver, model)
    sync.verify(receiver)
    with model.disable_adapter(), pytest.raises(UserError, match="adapters are disabled"):
        sync.changed(model)


def test_an_adapter_with_other_targets_begins_with_a_full_set(base) -> None:
    model = peft.get_peft_model(load(base), config(target_modules=["q_proj"]))
    sync.changed(model)
    model.add_adapter("other", config(target_modules=["v_proj"]))
    model.set_adapter("other")
    steps(model, 1)
    patches, receiver = sync.changed(model), load(base)
    sync.apply(receiver, patches.to_bytes())
    assert patches.full and same_logits(receiver, model)


def test_deltas_that_nobody_wrote_and_weights_trained_whole_are_refused(base) -> None:
    model = peft.get_peft_model(load(base), config())
    sync.changed(model)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "spiel_values" in name:
                values.add_(1)
    with pytest.raises(UserError, match="scale_sft.peft.write"):
        sync.changed(model)
    whole = peft.get_peft_model(load(base), config(modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match=r"lm_head.*trained whole.*modules_to_save"):
        sync.changed(whole)
