"""Decoder blocks under torch.compile: how many graphs they need, and where they run as they are."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import scale_sft
from scale_sft.errors import UserError
from scale_sft.model import compiled_blocks
from scale_sft.model.compiled_blocks import compile_blocks, decoder_blocks, refuse_uncompilable
from scale_sft.spiel.schedules import Phase
from scale_sft.training import assemble


@pytest.fixture
def graphs(monkeypatch):
    """A counter of the graphs that are made; they run the model's operations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_blocks, "BACKEND", counter)
    return lambda: counter.frame_count


def llama(layers: int):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=layers, vocab_size=64, use_cache=False))


def batch(rows: int, length: int, padded: int = 0) -> dict:
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, length - padded :] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def test_a_block_with_its_taps_on_is_one_graph_without_breaks(tiny_model, architecture) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).train()
    model.config.use_cache = False
    scale_sft.attach(model, density=0.1)
    block, calls = decoder_blocks(model, [name for name, _ in model.named_parameters()])[0], []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(input_ids=torch.arange(10).view(2, 5))
    hook.remove()
    ((args, kwargs),) = calls
    found = torch._dynamo.explain(block)(*args, **kwargs)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_all_blocks_share_two_graphs_whatever_the_lengths_and_a_single_sequence_two_more(graphs) -> None:
    """One without and one with a mask. 9 blocks: dynamo lets a function have 8 graphs."""
    model = llama(9)
    sparse = scale_sft.attach(model, density=0.02)
    optimizer = sparse.optimizer(lr=1e-3)
    compile_blocks(decoder_blocks(model, sparse.shapes))
    for inputs in [(2, 8), (2, 11), (4, 8, 3), (3, 17), (2, 16, 1)]:
        model(**batch(*inputs)).loss.backward()
        optimizer.step()
    assert graphs() == 2
    for inputs in [(1, 8), (1, 9, 2), (1, 12)]:
        model(**batch(*inputs)).loss.backward()
    assert graphs() == 4


def test_in_a_loop_of_ones_own_blocks_compile_after_attach() -> None:
    """As docs/python.md says; a layer whose input needs no gradient still records."""
    torch._dynamo.reset()
    digests = []
    for compiled in (False, True):
        model = llama(2)
        sparse = scale_sft.attach(
            model, method="ag", density=0.05, total_steps=6, update_interval_steps=2, estimation_steps=2
        )
        optimizer = sparse.optimizer(lr=1e-2)
        if compiled:
            for block in model.model.layers:
                block.compile(dynamic=True, backend="eager")
        for length in (8, 11, 9, 20):
            model(**batch(2, length), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        digests.append(sparse.tuning.digests())
        assert len(optimizer.turnovers) == 2
    assert digests[0] == digests[1]


@pytest.mark.parametrize("as_they_are", [True, False])
def test_evaluation_runs_the_blocks_as_they_are_and_so_does_a_step_that_asks_for_it(graphs, as_they_are) -> None:
    model = llama(2)
    sparse = scale_sft.attach(model, density=0.1)
    sparse.optimizer(lr=1e-3)
    compile_blocks(decoder_blocks(model, sparse.shapes), as_they_are=lambda: as_they_are)
    with torch.no_grad():
        before = model(**batch(2, 8)).loss
        model.generate(input_ids=torch.arange(4)[None], max_new_tokens=2, use_cache=True)
    assert graphs() == 0
    loss = model(**batch(2, 8)).loss
    loss.backward()
    assert graphs() == (not as_they_are) and torch.equal(loss.detach(), before)


def test_ranks_that_choose_together_run_blocks_as_they_are_also_after_a_first_choice(session, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(assemble, "compile_blocks", lambda blocks, as_they_are: asked.append(as_they_are))
    sparse = session(compile="blocks").sparse
    (meeting,) = asked
    for _ in range(2):
        recorder = sparse.tuning.recorder
        recorder.begin_step(Phase.PROPOSE)
        monkeypatch.setattr(sparse.group, "size", 2)
        assert meeting()
        recorder.begin_step(Phase.OFF)
        assert not meeting()
        monkeypatch.setattr(sparse.group, "size", 1)
        assert not meeting()
        sparse.rebuild({delta.name: delta.active for delta in sparse.tuning.store})
        assert sparse.tuning.recorder is not recorder


def test_blocks_that_torch_cannot_trace_are_one_line_of_error(graphs) -> None:
    class Block(nn.Module):
        def forward(self, hidden):
            torch._dynamo.graph_break()
            return hidden

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    compile_blocks(decoder_blocks(nn.ModuleDict({"model": model}), ["model.layers.0.up.weight"]))
    with pytest.raises(UserError, match=r"^compile: Block does not compile into one graph here: .*--compile off$"):
        model.layers[0](torch.ones(1, 2, 3))


def test_what_cannot_be_compiled_is_refused_before_anything_is_loaded(run_options, monkeypatch, session) -> None:
    cpu, plain = torch.device("cpu"), {"sharded": False, "attention": "sdpa"}
    with pytest.raises(UserError, match="compile: .*flex_attention"):
        refuse_uncompilable(cpu, sharded=False, attention="flex_attention")
    monkeypatch.setattr("scale_sft.training.assemble.load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="compile: .*shards.*base_placement replicate"):
        session(compile="blocks", base_placement="shard")
    refuse_uncompilable(cpu, **plain)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"compile: .*C\+\+ compiler"):
        session(compile="blocks")
