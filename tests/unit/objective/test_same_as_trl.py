"""Losses and gradients of each objective are those of TRL's trainers, pair by pair, in fp32."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl")

PLAIN = {"report_to": "none", "use_cpu": True, "bf16": False, "fp16": False}


@pytest.fixture
def models(tmp_path):
    """(session) -> the model with its deltas and the base, both of transformers, with gradients everywhere."""

    def load(session):
        trained, base = (AutoModelForCausalLM.from_pretrained(session.inputs.config.model.base) for _ in range(2))
        state = {name.replace("_orig_mod.", ""): value for name, value in session.model.state_dict().items()}
        trained.load_state_dict({name: state[name].clone() for name in trained.state_dict()})
        return trained.train(), base.eval()

    return load


def rows_of(session, sequences):
    """Sequences of a session as TRL collates them: padded on the right, with a mask of what counts."""
    tokens = [session.inputs.train.sequence(number) for number in sequences]
    length = max(len(ids) for ids, _ in tokens)
    padded = lambda values, fill: torch.tensor([[*row, *[fill] * (length - len(row))] for row in values])
    return {
        "input_ids": padded([ids for ids, _ in tokens], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in tokens], 0),
        "completion_mask": padded([(labels != -100).astype(int) for _, labels in tokens], 0),
    }


def gradient_of(session, model):
    """The gradients of all active entries, in the order of the store."""
    weights = dict(model.named_parameters())
    return torch.cat([weights[delta.name].grad.flatten()[delta.indices.long()] for delta in session.tuning.store])


def assert_same(step, loss, session, model):
    model.zero_grad()
    loss.backward()
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = gradient_of(session, model)
    torch.testing.assert_close(step.gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def dpo_trainer(models, tmp_path, tokenizer):
    """(session) -> TRL's DPO trainer on its models."""

    def make(session):
        from datasets import Dataset

        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        arguments = trl.DPOConfig(output_dir=str(tmp_path), **PLAIN)
        trained, base = models(session)
        return trl.DPOTrainer(trained, base, args=arguments, train_dataset=rows, processing_class=tokenizer)

    return make


DPO = [
    ({}, ["sigmoid"], None),
    ({"label_smoothing": 0.1}, ["robust"], None),
    ({"length_normalised": True, "beta": 2.0}, ["sigmoid_norm"], None),
    ({"sft_weight": 0.2}, ["sigmoid", "sft"], [1.0, 0.2]),
    ({"objective": "ipo"}, ["ipo"], None),
    ({"packing": True}, ["sigmoid"], None),
    ({"packing": True, "attention": "eager", "objective": "ipo"}, ["ipo"], None),
    ({"gradient_checkpointing": True, "reference": "swapped"}, ["sigmoid"], None),
    ({"packing": True, "gradient_checkpointing": True, "label_smoothing": 0.2, "reference": "swapped"}, ["robust"], None),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kinds", "weights"), DPO, ids=lambda value: str(value))
def test_pairs(prefer, step_of, dpo_trainer, options, kinds, weights):
    run = prefer(**options)
    trainer = dpo_trainer(run)
    trainer.loss_types, trainer.loss_weights = kinds, weights or [1.0]
    trainer.beta, trainer.label_smoothing = (
        run.inputs.config.objective.beta,
        run.inputs.config.objective.label_smoothing,
    )
    for batch in ([3], [20], [1, 7, 12]):
        inputs = rows_of(run, [2 * n for n in batch] + [2 * n + 1 for n in batch])
        assert_same(step_of(run, batch), trainer.compute_loss(trainer.model, inputs), run, trainer.model)


@pytest.mark.parametrize("options", [{}, {"packing": True, "reference": "swapped"}], ids=str)
def test_marked_answers(prefer, step_of, models, tmp_path, tokenizer, options):
    from datasets import Dataset

    run = prefer("kto", desirable_weight=1.5, **options)
    trained, base = models(run)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 4)
    arguments = trl.KTOConfig(output_dir=str(tmp_path), desirable_weight=1.5, **PLAIN)
    trainer = trl.KTOTrainer(trained, base, args=arguments, train_dataset=rows, processing_class=tokenizer)
    for batch in ([0, 1], [2, 5, 9, 12, 13]):
        inputs = rows_of(run, [2 * n for n in batch])
        inputs |= {f"KL_{name}": value for name, value in rows_of(run, [2 * n + 1 for n in batch]).items()}
        inputs["label"] = torch.from_numpy(run.inputs.train.good[batch])
        assert_same(step_of(run, batch), trainer.compute_loss(trainer.model, inputs), run, trainer.model)


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "packing": True}], ids=str)
def test_odds_ratios(prefer, step_of, models, tmp_path, options):
    """TRL's cross entropy counts the prompt too; a prompt of <s> alone is never predicted."""
    from trl.experimental.orpo import ORPOTrainer

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"prompt": "", "chosen": "{n} yes", "rejected": "no {n}{n}"}}\n' for n in range(8)))
    run = prefer("orpo", train_data=str(data), **options)
    trained, _ = models(run)
    for batch in ([3], [1, 4, 5]):
        inputs = rows_of(run, [2 * n for n in batch] + [2 * n + 1 for n in batch])
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        logits = trained(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        means = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
        own = SimpleNamespace(beta=run.inputs.config.objective.beta, accelerator=SimpleNamespace(device="cpu"))
        ratios = ORPOTrainer.odds_ratio_loss(own, *means.chunk(2))[0]
        chosen = labels[: len(batch), 1:]
        nll = torch.nn.functional.cross_entropy(logits[: len(batch), :-1].transpose(1, 2), chosen, reduction="sum")
        loss = nll / (chosen != -100).sum() - ratios.mean()
        assert_same(step_of(run, batch), loss, run, trained)
