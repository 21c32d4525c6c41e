"""Experts of fused parameters are sent as the checkpoint's files hold them: one by one, gate and up apart."""

import pytest
import torch
from safetensors.torch import load_file
from trainers import Trainer, load, same_weights

from scale_sft import sync
from scale_sft.errors import UserError
from tests.expert_models import make_experts


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "nemotron_h"])
def test_a_receiver_follows_the_trainer_and_the_names_are_those_of_the_files(tmp_path, kind) -> None:
    base = make_experts(kind, tmp_path / "base", torch.bfloat16)
    trainer, receiver = Trainer(base), load(base)
    stored = load_file(base / "model.safetensors")
    for _ in range(4):
        trainer.step()
        patches = sync.changed(trainer.sparse)
        assert sync.apply(receiver, patches.to_bytes()) == trainer.steps
        assert same_weights(receiver, trainer.model)
    sync.verify(receiver)
    assert all(tuple(stored[name].shape) == shape for name, shape in patches.shapes.items())
    assert any(".experts.11." in name for name in patches.shapes)
    late = load(base)
    sync.apply(late, sync.full(trainer.sparse).to_bytes())
    assert same_weights(late, trainer.model)


def test_files_that_hold_all_experts_in_one_tensor_are_refused_by_name(tmp_path) -> None:
    trainer = Trainer(make_experts("granitemoe", tmp_path / "base", torch.bfloat16))
    with pytest.raises(UserError, match=r"got 'model\..*experts\.gate_up_proj\.0', but .* all experts in one tensor"):
        sync.changed(trainer.sparse)
