"""The loss is torch's cross entropy of the target tokens; it makes no copy of all logits in fp32."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from scale_sft.model import loss
from scale_sft.model.loss import IGNORED
from scale_sft.planning.meta_trace import LiveBytes

VOCABULARY = 37


class Fixed(nn.Module):
    """A model whose logits are a parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.logits * 1)


@pytest.fixture
def batch():
    labels = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :3], labels[1] = IGNORED, IGNORED
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def logits(dtype):
    return (8 * torch.randn(3, 7, VOCABULARY, generator=torch.Generator().manual_seed(1))).to(dtype)


def of_torch(model, batch):
    following = batch["labels"][:, 1:]
    picked = model(batch["input_ids"], use_cache=False).logits[:, :-1][following != IGNORED]
    return functional.cross_entropy(picked.float(), following[following != IGNORED], reduction="none")


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, loss.CPU_LOGITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_those_of_torch_and_gradients_too(dtype, at_once, batch, monkeypatch):
    monkeypatch.setattr(loss, "CPU_LOGITS", at_once)
    ours, theirs = Fixed(logits(dtype)), Fixed(logits(dtype))
    found, expected = loss.token_losses(ours, batch), of_torch(theirs, batch)
    assert torch.equal(found, expected) and found.dtype is torch.float32
    weights = torch.linspace(-1, 2, len(found))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.logits.grad.dtype is dtype
    torch.testing.assert_close(ours.logits.grad, theirs.logits.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert not ours.logits.grad[1].any() and not ours.logits.grad[:, -1].any()  # what predicts no target


def test_a_batch_without_targets_costs_and_teaches_nothing(batch):
    model = Fixed(logits(torch.bfloat16))
    batch["labels"][:] = IGNORED
    total = loss.token_loss_sum(model, batch)
    total.backward()
    assert total == 0 and not model.logits.grad.any()


def test_beside_the_logits_lie_their_gradient_and_a_few_rows(monkeypatch):
    monkeypatch.setattr(loss, "CPU_LOGITS", 4 * 1000)
    rows = torch.zeros(256, 1000, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes(nn.Module()) as count:
        loss.cross_entropies(rows, torch.arange(256), torch.zeros(256, dtype=torch.int64)).sum().backward()
    few_rows = 4 * 4000 * (4 + 4 + 2)  # numbers in fp32, made and kept by an operation or two
    assert rows.nbytes < count.peak < rows.nbytes + few_rows < 1.5 * rows.nbytes
