"""The reference is the base, or the base with an adapter, bit for bit, however often the deltas go out and come back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.errors import UserError
from scale_sft.objective import log_probabilities as passes
from scale_sft.objective import reference as references
from scale_sft.train import train
from scale_sft.training.lifecycle import NullMetrics


class NoCheckpoints:
    run = None

    def save_if_due(self, metrics):
        pass


def all_of(session, model=None):
    objective = session.objective
    pad = session.inputs.tokenizer.pad_token_id
    return passes.of_all(model or session.model, objective.examples, session.cluster, pad)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("precomputed", {}),
        ("swapped", {"dtype": "bfloat16", "method": "ma", "learning_rate": 0.1}),
        pytest.param("swapped", {"quantization": "nf4"}, marks=pytest.mark.quantized),
    ],
    ids=str,
)
def test_after_100_steps_the_reference_has_the_bits_that_it_had_before_step_1(session, preferences_file, kind, options):
    run = session(
        objective="dpo", train_data=str(preferences_file), max_length=64, steps=100, reference=kind,
        update_interval_steps=20, estimation_steps=5, **options,
    )  # fmt: skip
    before = all_of(run)  # the deltas are zero
    run.objective.prepare()
    train(run, NullMetrics(), NoCheckpoints())
    assert run.step == 100
    trained = all_of(run)
    assert not torch.equal(trained, before), "the deltas are in"
    with run.objective.reference.weights.in_place():
        assert torch.equal(all_of(run), before)
    assert torch.equal(all_of(run), trained), "and they came back"
    if kind == "precomputed":
        assert torch.equal(run.objective._table, before)
    else:  # measured in the micro-batches of a step
        run.objective.share([3, 8], proposing=False)
        torch.testing.assert_close(run.objective._table[[6, 7, 16, 17]], before[[6, 7, 16, 17]], rtol=2e-2, atol=1e-2)


def test_the_table_has_the_same_bits_for_any_number_of_ranks(prefer, monkeypatch):
    monkeypatch.setattr(passes, "GROUP_TOKENS", 64)
    run = prefer()
    alone = all_of(run)
    for ranks in (2, 4):
        total = torch.zeros_like(alone)
        for rank in range(ranks):  # one after the other: the sum over ranks is made below
            cluster = type("Rank", (), {"rank": rank, "size": ranks, "device": run.cluster.device})()
            cluster.agree_to_stop = cluster.sum_ = lambda *_: None
            part = passes.of_all(run.model, run.objective.examples, cluster, 258)
            assert torch.equal(total != 0, (total != 0) & (part == 0)), "each sequence is measured once"
            total += part
        assert torch.equal(total, alone)


def test_it_is_measured_without_the_noise_that_training_may_draw(prefer):
    run = prefer(reference="swapped")
    noise = lambda module, inputs, output: output + torch.rand_like(output) if module.training else output
    run.model.get_input_embeddings().register_forward_hook(noise)
    assert torch.equal(all_of(run), all_of(run)) and run.model.training
    tables = [run.objective.share([3, 8], proposing=False) and run.objective._table.clone() for _ in range(2)]
    assert torch.equal(*tables) and run.model.training


def test_it_is_measured_once_per_base_and_data_and_then_taken_from_the_cache(
    prefer, tmp_path, monkeypatch, marked_file
):
    own = {"cache_dir": str(tmp_path / "cache")}
    first = prefer(**own)
    calls = []
    measure = references.of_all
    monkeypatch.setattr(references, "of_all", lambda *given: calls.append(1) or measure(*given))
    second = prefer(**own, learning_rate=0.5, seed=3, micro_batch_size=1)
    assert not calls and torch.equal(first.objective._table, second.objective._table)
    prefer(**own, max_train_examples=7), prefer(**own, dtype="bfloat16")
    prefer("kto", **own)
    assert len(calls) == 3
    (damaged, *_) = (tmp_path / "cache").glob("reference-*.safetensors")
    for file in (tmp_path / "cache").glob("reference-*.safetensors"):
        file.write_bytes(damaged.read_bytes()[:50])
    again = prefer(**own)
    assert len(calls) == 4 and torch.equal(again.objective._table, first.objective._table)


def test_the_same_weights_under_other_settings_are_another_reference(prefer, tiny_model, tmp_path):
    own, first = {"cache_dir": str(tmp_path / "cache")}, None
    for epsilon in (None, 0.5):
        base = tmp_path / f"base-{epsilon}"
        shutil.copytree(tiny_model("llama"), base)
        settings = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**settings, **({"rms_norm_eps": epsilon} if epsilon else {})}))
        run = prefer(base=str(base), **own)
        assert first is None or not torch.equal(run.objective._table, first), "not taken from the cache"
        first = run.objective._table
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    prefer(base=str(copy), **own)
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 2, "its folder does not matter"


@pytest.mark.parametrize(("kind", "dtype"), [("precomputed", "bfloat16"), ("swapped", "float32")])
def test_a_reference_adapter_is_part_of_the_reference(train_run, prefer, session, tmp_path, kind, dtype):
    adapter = train_run(output_dir=str(tmp_path / "sft"), dtype=dtype) / "adapter"
    run = prefer(dtype=dtype, reference_adapter=str(adapter), reference=kind)
    own = {"dtype": getattr(torch, dtype), "attn_implementation": run.inputs.attention.name}
    model = AutoModelForCausalLM.from_pretrained(run.inputs.config.model.base, **own)
    apply_adapter(model, Adapter.load(adapter))
    expected = all_of(run, model)
    trained = all_of(run)
    for _ in range(2):
        with run.objective.reference.weights.in_place():
            assert torch.equal(all_of(run), expected)
        assert torch.equal(all_of(run), trained)
    further = session(
        objective="dpo", train_data=run.inputs.config.data.train_data, max_length=64, dtype=dtype, reference=kind,
        reference_adapter=str(adapter), start_from=str(adapter), density="none",
    )  # fmt: skip
    assert not any("without the adapter" in note for note in further.objective.notes)
    further.objective.prepare()
    share = further.objective.share([0, 5], proposing=False)
    (micro_batch,) = further.micro_batches([0, 5], proposing=False)
    assert share.loss_sum(further.model, micro_batch).item() == pytest.approx(0.693147, rel=1e-2)


def test_an_adapter_of_another_base_or_of_other_weights_is_refused(train_run, prefer, tmp_path, tiny_model):
    adapter = train_run(output_dir=str(tmp_path / "sft"), target_modules="q_proj") / "adapter"
    with pytest.raises(UserError, match="reference_adapter: .* has 2 target weights, the run 14"):
        prefer(reference_adapter=str(adapter))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[0].self_attn.q_proj.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((tiny_model("llama") / name).read_bytes())
    with pytest.raises(UserError, match="reference_adapter: got a base of hash .*was trained on. Fix: give that base"):
        prefer(reference_adapter=str(adapter), target_modules="q_proj", base=str(tmp_path / "other"))
    with pytest.raises(UserError, match="reference_adapter: .*nowhere"):
        prefer(reference_adapter=str(tmp_path / "nowhere"))


def test_a_run_that_starts_from_an_adapter_and_leaves_it_out_of_the_reference_says_so(
    train_run, session, tmp_path, preferences_file
):
    adapter = str(train_run(output_dir=str(tmp_path / "sft")) / "adapter")
    given = {"train_data": str(preferences_file), "max_length": 64, "start_from": adapter, "density": "none"}
    notes = {kind: session(objective=kind, **given).objective.notes for kind in ("dpo", "orpo")}
    assert f"--reference_adapter {adapter}" in notes["dpo"][0] and not notes["orpo"]
