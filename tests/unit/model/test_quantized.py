"""A base in 4 or 8 bits under transient deltas: same run as on its dequantised weights, packed bytes never change."""

import json
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scale_sft.config.loading import load
from scale_sft.config.options import ModelConfig
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.files import PACKAGE
from scale_sft.model import quantization as quantized
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.loading import load_base, load_model_config
from scale_sft.model.packed_weights import packed_weights
from scale_sft.model.quantization import resolve_quantization
from scale_sft.model.resident import WeightPart, effective_values
from scale_sft.model.targets import find_targets
from scale_sft.model.transient import TransientDeltas
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.taps import detach
from scale_sft.train import forward_backward
from scale_sft.training import assemble
from scale_sft.training.inputs import read_inputs
from tests.methods import ESTIMATED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
KINDS = ("nf4", "fp4", "int8")


def load_quantized(folder, kind, dtype="float32", **options):
    config = ModelConfig(base=str(folder), dtype=dtype, quantization=kind, **options)
    model_config = load_model_config(config)
    quantization = resolve_quantization(config, model_config)
    return load_base(config, model_config, torch.device("cpu"), quantization), quantization


def dequantized_copy(folder: Path, kind: str, output: Path, dtype: str = "float32") -> Path:
    """The same model with the dequantised values of its linear layers in its files."""
    import shutil

    model, _ = load_quantized(folder, kind, dtype)
    packed = packed_weights(model, getattr(torch, dtype), torch.device("cpu"))
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in load_file(folder / "model.safetensors").items()}
    for name, weight in packed.items():
        value = weight.dequantize(weight.module.weight.data)
        stored = name if name in tensors else name.removeprefix("transformer.")
        if weight.module.source_cls.__name__ == "Conv1D":
            value = value.t()
        assert tensors[stored].shape == value.shape
        tensors[stored] = value.contiguous()
    shutil.copytree(folder, output)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.fixture
def open_session(run_options):
    """(option=value, ...) -> a session, before its first step."""
    clusters = []

    def open_(**options):
        config = load(None, {**run_options, **options})
        inputs = read_inputs(config)
        clusters.append(Cluster.start(sharded=False, dtype=inputs.dtype))
        return assemble.assemble(inputs, clusters[-1])

    yield open_
    for cluster in clusters:
        cluster.close()


def recorded(folder, event):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def assert_same_run(mine: Path, other: Path, tolerance: float = 1e-6):
    losses = [[step["loss"] for step in recorded(folder, "step")] for folder in (mine, other)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (mine, other))
    for name in a:
        same = a[name].equal(b[name]) if name.endswith(".indices") else (a[name] - b[name]).abs().max() < 1e-5
        assert same, name


@pytest.mark.parametrize(("kind", "method"), [("nf4", "ag"), ("int8", "ma"), ("fp4", "static")])
def test_a_run_equals_the_run_on_the_base_dequantised_beforehand(
    train_run, tiny_model, tmp_path, pairs_file, kind, method
):
    plain = dequantized_copy(tiny_model("llama"), kind, tmp_path / "plain")
    chosen = ESTIMATED if method == "static" else {"method": method}
    options = chosen | {"steps": 7, "log_every_steps": 1}
    reference = train_run(base=str(plain), output_dir=str(tmp_path / "a"), **options)
    # evaluations between the steps, by forward passes and by generation in evaluation mode, must change nothing
    mine = train_run(
        quantization=kind, output_dir=str(tmp_path / "b"), eval_data=str(pairs_file), eval_every_steps=1,
        exact_match_examples=2, max_new_tokens=2, max_eval_examples=4, **options,
    )  # fmt: skip
    assert_same_run(mine, reference)
    assert len(recorded(mine, "reallocation")) == (1 if method == "static" else 3)


def test_conv1d_layers_are_quantised_turned_round_and_give_the_same_loss(train_run, tiny_model, tmp_path):
    folder = tiny_model("gpt2")
    plain = dequantized_copy(folder, "nf4", tmp_path / "plain")
    losses = []
    for number, options in enumerate(({"base": str(plain)}, {"base": str(folder), "quantization": "nf4"})):
        run = train_run(output_dir=str(tmp_path / str(number)), steps=1, log_every_steps=1, **options)
        losses.append(recorded(run, "step")[0]["loss"])
        shapes = json.loads((run / "adapter" / "adapter_config.json").read_text())["shapes"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == [128, 32]


def test_gradients_equal_those_of_the_dequantised_base_with_deltas_and_checkpointing(
    open_session, tiny_model, tmp_path
):
    plain = dequantized_copy(tiny_model("llama"), "nf4", tmp_path / "plain")
    gradients = []
    packed = {"quantization": "nf4"}
    for options in ({"base": str(plain)}, packed, packed | {"gradient_checkpointing": True}):
        session = open_session(**options)
        store = session.tuning.store
        store.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        session.resident.write()
        session.tuning.begin_step(1)
        forward_backward(session, session.inputs.order.batch(1))
        gradients.append(session.tuning.recorder.gradients.clone())
    assert gradients[0].abs().max() > 0
    for mine in gradients[1:]:
        torch.testing.assert_close(mine, gradients[0], rtol=1e-5, atol=1e-7)


def test_effective_weight_follows_the_one_rounding_rule_in_bfloat16(tiny_model):
    model, _ = load_quantized(tiny_model("llama"), "nf4", "bfloat16")
    targets = find_targets(model, None)
    store = DeltaStore({t.name: t.shape for t in targets}, {t.name: 40 for t in targets})
    store.flat.normal_(std=0.05)
    packed = packed_weights(model, torch.bfloat16, torch.device("cpu"))
    deltas = TransientDeltas(store, packed)
    delta = next(iter(store))
    bare = packed[delta.name].dequantize(packed[delta.name].module.weight.data).view(-1)
    mine = deltas.effective_weight(delta.name)
    assert mine.dtype is torch.bfloat16 and mine.shape == delta.shape
    chosen = delta.indices.long()
    assert mine.view(-1)[chosen].equal(effective_values(bare[chosen], delta.deltas))
    mine.view(-1)[chosen] = bare[chosen]
    assert mine.view(-1).equal(bare), "only active entries differ from the base"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantised_values_are_those_of_bitsandbytes(tiny_model, kind, dtype):
    from bitsandbytes import functional

    model, _ = load_quantized(tiny_model("llama"), kind, dtype)
    module = model.model.layers[0].mlp.up_proj
    if kind == "int8":
        expected = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(getattr(torch, dtype))
    else:
        expected = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    weight = packed_weights(model, getattr(torch, dtype), torch.device("cpu"))["model.layers.0.mlp.up_proj.weight"]
    assert weight.dequantize(module.weight.data).equal(expected)


def test_the_weight_is_dequantised_once_per_forward_and_once_per_backward(open_session, monkeypatch):
    session = open_session(quantization="nf4")
    assert session.prove_loss() == []  # forward passes of their own, once
    counts = dict.fromkeys(session.resident.packed, 0)
    for name, packed in session.resident.packed.items():

        def counted(stored, name=name, stock=packed.dequantize):
            counts[name] += 1
            return stock(stored)

        monkeypatch.setattr(packed, "dequantize", counted)
    session.tuning.begin_step(1)
    forward_backward(session, session.inputs.order.batch(1))
    first = {f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"}  # nothing below them wants a gradient
    assert counts == {name: 1 if name in first else 2 for name in counts}


def test_no_copy_of_a_weight_outlives_its_product(open_session):
    """After forward, before backward: autograd keeps activations only."""
    session = open_session(quantization="nf4")
    shapes = {target.shape for target in session.targets}
    ids = torch.tensor([session.inputs.train.tokens(0)[0].tolist()])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        session.model(input_ids=ids)
    assert kept and not shapes & set(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_base_and_its_hash_never_change(open_session, kind):
    session = open_session(quantization=kind)
    before = {name: packed.module.weight.data.clone() for name, packed in session.resident.packed.items()}
    for step in (1, 2):
        session.tuning.begin_step(step)
        forward_backward(session, session.inputs.order.batch(step))
        session.tuning.update(0.01)
        session.model.eval()
        with torch.no_grad():
            session.model(input_ids=torch.arange(8)[None])
        session.model.train()
    assert all(packed.module.weight.data.equal(before[name]) for name, packed in session.resident.packed.items())
    session.check_packed_base()
    session.targets[3].module.weight.data.view(-1)[5] ^= 1
    with pytest.raises(UserError, match="packed weights have changed"):
        session.check_packed_base()


def test_a_changed_scale_changes_the_hash(open_session):
    session = open_session(quantization="nf4")
    session.resident.packed[session.targets[0].name].state.absmax[0] ^= 1
    with pytest.raises(UserError, match="packed weights have changed"):
        session.check_packed_base()


def test_no_layer_may_repack_its_weight_on_avx512_bf16_processors(open_session):
    session = open_session(quantization="nf4")
    layers = [module for module in session.model.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_bitsandbytes_runs_compute_in_the_dtype_of_the_run(dtype, stored, tiny_model, tmp_path, caplog):
    """transformers' default is float32, which is several times slower than bf16 on a GPU."""
    folder, kind, name = tiny_model("llama"), "nf4", str(dtype).removeprefix("torch.")
    if stored:
        load_quantized(folder, kind)[0].save_pretrained(tmp_path)
        folder, kind = tmp_path, "none"
    model, _ = load_quantized(folder, kind, name)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert layers[0](torch.ones(2, 3, 32, dtype=dtype)).dtype is dtype
            assert {layer.compute_dtype for layer in layers} == {dtype}
    assert not [record for record in caplog.records if "compute_dtype" in record.getMessage()]
    if dtype is torch.bfloat16:  # sums of float32 products, rounded once, would be others
        x, exact = torch.randn(64, 32).bfloat16(), packed_weights(model, torch.float32, torch.device("cpu"))
        weight = exact[next(iter(exact))]
        assert torch.equal(layers[0](x), x @ weight.dequantize(weight.module.weight.data).bfloat16().t())


def test_not_even_the_layers_own_evaluation_repacks_their_weights(open_session):
    session = open_session(quantization="nf4")
    module = session.model.model.layers[0].self_attn.q_proj  # 32 x 32: of a shape that would be repacked
    before = module.weight.data.clone()
    detach(module)
    session.model.eval()
    with torch.no_grad():
        module(torch.ones(1, 3, 32))
    assert module.weight.data.equal(before)
    session.check_packed_base()


def test_nothing_is_raised_to_fp32_and_everything_is_frozen(open_session, tiny_model):
    session = open_session(quantization="nf4", base=str(tiny_model("opt", "bfloat16")))
    packed = {id(weight.module.weight) for weight in session.resident.packed.values()}
    rest = [parameter for parameter in session.model.parameters() if id(parameter) not in packed]
    assert rest and {parameter.dtype for parameter in rest} == {torch.bfloat16}  # norms, biases, embeddings
    assert not any(parameter.requires_grad for parameter in session.model.parameters())
    assert session.model.get_output_embeddings().weight.dtype is torch.bfloat16  # never quantised


def test_layers_outside_the_targets_compute_with_their_dequantised_weights_too(train_run, tiny_model, tmp_path):
    plain = dequantized_copy(tiny_model("llama"), "int8", tmp_path / "plain")
    options = {"target_modules": "q_proj,v_proj", "steps": 3, "log_every_steps": 1}
    reference = train_run(base=str(plain), output_dir=str(tmp_path / "a"), **options)
    assert_same_run(train_run(quantization="int8", output_dir=str(tmp_path / "b"), **options), reference)


def test_indices_and_budgets_count_in_the_dequantised_shape(open_session):
    session, plain = open_session(quantization="nf4", density=0.5), open_session(density=0.5)
    assert [target.shape for target in session.targets] == [target.shape for target in plain.targets]
    assert all(a.indices.equal(b.indices) for a, b in zip(session.tuning.store, plain.tuning.store, strict=True))
    assert max(int(delta.indices[-1]) / delta.numel for delta in session.tuning.store) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_quantised_on_disk_loads_as_it_is(train_run, tiny_model, tokenizer, tmp_path, kind):
    model, _ = load_quantized(tiny_model("llama"), kind)
    model.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    mine = train_run(base=str(tmp_path / "stored"), output_dir=str(tmp_path / "a"), log_every_steps=1, steps=3)
    other = train_run(quantization=kind, output_dir=str(tmp_path / "b"), log_every_steps=1, steps=3)
    assert_same_run(mine, other)
    wrong = next(k for k in KINDS if k != kind)
    with pytest.raises(UserError, match=f"stored in {kind} already"):
        train_run(base=str(tmp_path / "stored"), quantization=wrong, output_dir=str(tmp_path / "c"))


def test_the_hash_does_not_depend_on_how_packed_bytes_are_cut(tiny_model):
    model, _ = load_quantized(tiny_model("llama"), "nf4")
    flat = model.model.layers[0].mlp.up_proj.weight.data.view(-1)
    parts = [WeightPart(partial(flat.__getitem__, slice(a, b)), a, b) for a, b in ((0, 7), (7, 300), (300, len(flat)))]
    sums = [sum(column) % (1 << 64) for column in zip(*map(fingerprint, parts), strict=True)]
    assert tuple(sums) == fingerprint(WeightPart(lambda: flat, 0, len(flat)))


def test_bf16_deltas_keep_exact_ages_and_fp32_moments(open_session):
    session = open_session(quantization="nf4", delta_dtype="bfloat16", moments="float32")
    tuning = session.tuning
    assert tuning.store.flat.dtype is torch.bfloat16
    for step in range(1, 7):
        tuning.begin_step(step)
        forward_backward(session, session.inputs.order.batch(step))
        tuning.update(0.01)
        if tuning.schedule.reallocates_at(step):
            tuning.reallocate(step, session.resident)
    states = [tensor for name in tuning.store.names for tensor in tuning.optimizer.state_of(name).values()]
    assert {tensor.dtype for tensor in states} == {torch.float32}
    assert tuning.recorder.gradients.dtype is torch.float32
    assert tuning.optimizer.gradients_seen == [6, 6, 4, 2]  # by cohort: G at birth, then one a step
    assert {int(number) for delta in tuning.store for number in delta.cohort} <= {0, 1, 2, 3}
    assert tuning.store.flat.abs().max() > 0.005


def test_cohort_numbers_beyond_bf16_stay_exact():
    from scale_sft.spiel.drop_grow import apply_exchange, exchange_by_accumulators

    store = DeltaStore({"w": (4, 4)}, {"w": 4}, cohorts=600, dtype=torch.bfloat16)
    delta = store["w"]
    ones = torch.ones(4)
    apply_exchange(delta, exchange_by_accumulators(delta.indices, delta.deltas.abs(), ones, ones, 2), 513)
    assert sorted(delta.cohort.tolist()) == [0, 0, 513, 513]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_merged_bf16_model_is_the_trained_one(open_session, train_run, tiny_model, tmp_path, kind, architecture):
    from transformers import AutoModelForCausalLM

    from scale_sft.adapters.format import Adapter
    from scale_sft.adapters.merge import merge

    options = {
        "base": str(tiny_model(architecture)),
        "dtype": "bfloat16",
        "quantization": kind,
        "attention": "sdpa",
    }  # sdpa is what a stock call computes with
    run = train_run(**options)
    merged = merge(run / "adapter", tmp_path / "merged")
    session = open_session(**options, output_dir=str(tmp_path / "again"))
    adapter = Adapter.load(run / "adapter")
    for delta in session.tuning.store:
        delta.indices = adapter.indices[delta.name]
        delta.deltas.copy_(adapter.deltas[delta.name])
    ids = torch.tensor([session.inputs.train.tokens(3)[0].tolist()])
    stock = AutoModelForCausalLM.from_pretrained(merged)
    assert stock.dtype is torch.bfloat16 and not hasattr(stock.config, "quantization_config")
    with torch.no_grad():
        expected, found = session.model(input_ids=ids).logits, stock(input_ids=ids).logits
    assert found.equal(expected) if architecture == "llama" else torch.allclose(found, expected, atol=0.02)


def test_merging_on_another_base_is_refused(train_run, tiny_model, tmp_path):
    from scale_sft.adapters.merge import merge

    run = train_run(quantization="nf4", steps=2)
    with pytest.raises(UserError, match="not the one that the adapter was trained on"):
        merge(run / "adapter", tmp_path / "merged", base=str(tiny_model("llama", "bfloat16")))
    assert not (tmp_path / "merged").exists()


def test_merging_back_into_four_bits_prints_what_is_lost(train_run, pairs_file, tmp_path):
    from scale_sft.evaluation.requantize import merge_into_few_bits

    run = train_run(quantization="nf4", dtype="bfloat16", eval_data=str(pairs_file), max_eval_examples=4, steps=3)
    text = merge_into_few_bits(run / "adapter", tmp_path / "few", "nf4")
    assert "deltas vanish" in text and "merged in bfloat16" in text and "in nf4" in text
    _, quantization = load_quantized(tmp_path / "few", "none", "bfloat16")
    assert quantization.on_disk and quantization.kind == "nf4"
    assert {path.name for path in tmp_path.glob(".few*")} == set()


# --- placement and memory before a run ------------------------------------------------------------------------------


def test_auto_replicates_a_quantised_base_that_fits_and_says_why(run_options):
    from scale_sft.distributed.world import World
    from scale_sft.planning.footprint import footprint
    from scale_sft.planning.placement import choose_placement

    config = load(None, {**run_options, "quantization": "nf4", "base_placement": "auto"})
    model_config = load_model_config(config.model)
    quantization = resolve_quantization(config.model, model_config)
    need = footprint(config, model_config, torch.bfloat16, quantization)
    plain = footprint(config, model_config, torch.bfloat16)
    assert need.base < plain.base and need.deltas < plain.deltas

    class Roomy(World):
        def device_memory_bytes(self):
            return 10 * need.total

    class Tight(World):
        def device_memory_bytes(self):
            return need.total

    placed = choose_placement(config, model_config, torch.bfloat16, Roomy(0, 2, 0, 2), quantization)
    assert not placed.sharded and "moves no weights" in placed.reason
    placed = choose_placement(config, model_config, torch.bfloat16, Tight(0, 2, 0, 2), quantization)
    assert placed.sharded and "before it is cut into shards" in placed.reason


@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_size_of_the_base_is_the_loaded_one(tiny_model, kind, run_options):
    from scale_sft.planning.footprint import footprint

    config = load(None, {**run_options, "quantization": kind, "double_quantization": False})
    model, quantization = load_quantized(tiny_model("llama"), kind, double_quantization=False)
    planned = footprint(config, load_model_config(config.model), torch.float32, quantization).base
    state = sum(w.state_bytes for w in packed_weights(model, torch.float32, torch.device("cpu")).values())
    real = sum(parameter.nbytes for parameter in model.parameters()) + state
    assert real == pytest.approx(planned, rel=0.06 if kind == "int8" else 0.01)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_missing_and_old_bitsandbytes_are_named(train_run, monkeypatch):
    def missing(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(quantized.metadata, "version", missing)
    with pytest.raises(UserError, match="bitsandbytes >= 0.48, which is not installed"):
        train_run(quantization="nf4")
    monkeypatch.setattr(quantized.metadata, "version", lambda _: "0.41.3")
    with pytest.raises(UserError, match="found 0.41.3"):
        train_run(quantization="nf4")


def test_a_storage_type_that_zero3_corrupts_is_refused_when_sharding(train_run, tiny_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)
    folder = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), quantization_config=settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    train_run(base=str(folder), steps=1, dtype="bfloat16", output_dir=str(tmp_path / "replicated"))
    with pytest.raises(UserError, match="bnb_4bit_quant_storage.*may cast to bfloat16"):
        train_run(base=str(folder), dtype="bfloat16", base_placement="shard", output_dir=str(tmp_path / "sharded"))


def test_a_format_that_cannot_be_dequantised_is_refused(tiny_model, tmp_path, train_run):
    import shutil

    folder = shutil.copytree(tiny_model("llama"), tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="stored quantised by 'gptq'"):
        train_run(base=str(folder))


def test_a_layer_without_scales_cannot_be_dequantised():
    from bitsandbytes.nn import Linear4bit

    model = nn.Sequential(Linear4bit(8, 8))
    with pytest.raises(UserError, match="holds no scales"):
        packed_weights(model, torch.float32, torch.device("cpu"))


def test_resident_deltas_on_a_quantised_base_are_refused(open_session):
    from scale_sft.model.resident import ResidentDeltas

    session = open_session(quantization="nf4")
    parts = {target.name: session.cluster.part_of(target.module.weight) for target in session.targets}
    with pytest.raises(UserError, match="quantised.*TransientDeltas"):
        ResidentDeltas(session.tuning.store, parts)


RECIPES = sorted((PACKAGE / "recipes").glob("*nf4*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_quantised_bases_load(recipe):
    config = load(recipe, {})
    assert config.model.quantization == "nf4" and config.model.double_quantization
