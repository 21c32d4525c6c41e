"""Mutated adapters, checkpoints and data files: refused with a clear error or loaded rightly; nothing else changes."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scale_sft import train
from scale_sft.adapters.apply import apply_adapter, undo_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.config.loading import load
from scale_sft.data.cache import load_examples
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.resident import WeightPart
from scale_sft.reporting.metrics import NullMetrics
from scale_sft.training import assemble, checkpoint_files
from scale_sft.training.checkpoints import Checkpoints
from scale_sft.training.inputs import read_inputs
from scale_sft.training.run_folder import RunFolder

MUTANTS = 120
"""Of adapters, of checkpoints and of data files, each."""


def mutate_bytes(content: bytes, dice: random.Random) -> bytes:
    """Something that a bad disk, a bad copy or a bad editor does."""
    place, length = dice.randrange(max(1, len(content))), dice.randrange(1, 64)
    kind = dice.randrange(8)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + length :]
    if kind == 2:
        return content[:place] + dice.randbytes(length) + content[place:]
    if kind == 3:
        return content[:place] + bytes(length) + content[place + length :]
    if kind == 4:
        return content[:place] + content[place : place + length] * 2 + content[place + length :]
    if kind == 5:
        return content[:place] + bytes([content[place] ^ (1 << dice.randrange(8))]) + content[place + 1 :]
    if kind == 6:
        return dice.choice([b"", b"{}", b"[]", b"null", b"\x80\x04N.", b"[" * 100_000, b'{"a":' * 5000, b"NaN"])
    return (
        content[:place]
        + dice.choice([b"-1", b"1e999", b'"', b"}", b"\xff\xfe", b"999999999999999999999"])
        + content[place + 1 :]
    )


def mutate_tensors(file: Path, dice: random.Random) -> None:
    """A well-formed file of other content: what checksums and parsers do not see."""
    tensors = load_file(file)
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    kind = dice.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor[:-1]
    elif kind == 2:
        tensors[name] = tensor.to(dice.choice([torch.float64, torch.int64, torch.bfloat16, torch.bool]))
    elif kind == 3:
        tensors[name] = tensor.flip(0)
    elif kind == 4:
        tensors[name] = tensor.reshape(1, -1)
    elif kind == 5:
        tensors[f"{name}.more"] = tensor.clone()
    else:
        place = dice.randrange(tensor.numel())
        values = [float("nan"), float("inf"), 1e30] if tensor.is_floating_point() else [-1, 127, 0]
        tensors[name] = tensor.clone()
        tensors[name][place] = dice.choice(values)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def mutate_json(file: Path, dice: random.Random) -> None:
    """Well-formed JSON of other content: one value, somewhere, is another."""
    tree = json.loads(file.read_text())
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = dice.choice(places)
    others = [None, -1, 1 << 70, "", "../../../etc/passwd", [], {}, [[]], True, 0.5, "x" * 1000]
    node[key] = dice.choice(others)
    file.write_text(json.dumps(tree))


def outcome(action) -> str:
    """'loaded' or 'refused'; anything but a clear error fails the test."""
    try:
        action()
    except UserError as error:
        said = str(error)
    else:
        return "loaded"
    assert len(said) > 10
    return "refused"


@pytest.fixture(scope="module")
def session(tiny_model, pairs_file, tmp_path_factory):
    """A session after 5 of 6 steps, inside an estimation phase, and the checkpoint of that state."""
    folder = tmp_path_factory.mktemp("fuzz")
    options = {
        "base": str(tiny_model("llama")), "train_data": str(pairs_file), "output_dir": str(folder / "run"),
        "method": "ag", "density": 0.05, "steps": 8, "global_batch_size": 4, "update_interval_steps": 4,
        "estimation_steps": 3, "max_length": 32, "base_placement": "replicate", "save_every_steps": 1, "keep_last": 9,
    }  # fmt: skip
    inputs = read_inputs(load(None, options))
    with Cluster.start(sharded=False, dtype=torch.float32) as cluster:
        made = assemble.assemble(inputs, cluster)
        train.train(made, NullMetrics(), Checkpoints(made, RunFolder(folder / "run")))
        made.optimizer.steps = 8
        run = RunFolder(folder / "run")
        run.save_adapter(made.adapter())
        yield made, run


def weights_of(session) -> str:
    """A digest of all weights and of the whole state of the method."""
    prints = [fingerprint(WeightPart.whole(weight)) for weight in session.model.parameters()]
    recorder = sorted(
        (name, [t.tolist() for t in c.state().values()]) for name, c in session.tuning.recorder.candidates.items()
    )
    return json.dumps([prints, sorted(session.tuning.digests().items()), recorder, session.step])


def test_mutated_checkpoints(session, tmp_path):
    made, run = session
    original = run.checkpoints / "step_000006"  # steps 5 to 7 estimate
    assert "candidate_mean" in {
        kind
        for kinds in checkpoint_files.TensorFiles(checkpoint_files.verify(original)).kinds.values()
        for kind in kinds
    }
    seen = {"refused": 0, "loaded": 0}
    state = weights_of(made)
    for number in range(MUTANTS):
        dice = random.Random(number)
        mutant = tmp_path / f"{number}" / original.name
        shutil.copytree(original, mutant)
        file = dice.choice(sorted(mutant.iterdir()))
        if number % 3 == 0:
            file.write_bytes(mutate_bytes(file.read_bytes(), dice))
        else:  # with the right checksums: the content must be looked at
            file = mutant / dice.choice(["state.json", "tensors_00001.safetensors", "tensors_00001.safetensors"])
            (mutate_json if file.suffix == ".json" else mutate_tensors)(file, dice)
            active = json.loads((mutant / "manifest.json").read_text())["active_entries"]
            (mutant / "manifest.json").unlink()
            checkpoint_files._write_json(mutant / "manifest.json", checkpoint_files._manifest(mutant, 6, active))
        made.inputs = resuming(made.inputs, mutant)
        result = outcome(Checkpoints(made, run).resume)
        seen[result] += 1
        if result == "refused":
            assert weights_of(made) == state, f"mutant {number} was refused, but something has changed"
        state = weights_of(made)
        shutil.rmtree(mutant.parent)
    print(seen)
    assert seen["refused"] > MUTANTS // 2 and seen["loaded"] > 0
    made.inputs = resuming(made.inputs, run.checkpoints / "step_000008")
    Checkpoints(made, run).resume()


def resuming(inputs, path):
    import dataclasses

    run = dataclasses.replace(inputs.config.run, resume=str(path))
    return dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, run=run))


def test_mutated_adapters(session, tmp_path):
    made, run = session
    made.resident.restore()
    before = [fingerprint(WeightPart.whole(weight)) for weight in made.model.parameters()]
    seen = {"refused": 0, "loaded": 0}
    for number in range(MUTANTS):
        dice = random.Random(1000 + number)
        mutant = tmp_path / f"{number}"
        shutil.copytree(run.adapter, mutant)
        file = dice.choice(sorted(mutant.iterdir()))
        if number % 3 == 0:
            file.write_bytes(mutate_bytes(file.read_bytes(), dice))
        else:
            (mutate_json if file.suffix == ".json" else mutate_tensors)(file, dice)

        def use(mutant=mutant):
            adapter = Adapter.load(mutant)
            undo_adapter(made.model, adapter, apply_adapter(made.model, adapter))

        seen[outcome(use)] += 1
        assert before == [fingerprint(WeightPart.whole(weight)) for weight in made.model.parameters()]
    made.resident.write()
    print(seen)
    assert seen["refused"] > MUTANTS // 3


def test_mutated_data_files(pairs_file, messages_file, tokenizer, tmp_path):
    seen = {"refused": 0, "loaded": 0}
    config = load(None, {"density": 0.1, "max_length": 64}).data
    for number in range(MUTANTS):
        dice = random.Random(2000 + number)
        source = (pairs_file, messages_file)[number % 2]
        mutant = tmp_path / f"{number}.jsonl"
        lines = source.read_bytes().splitlines(keepends=True)[:6]
        mutant.write_bytes(mutate_bytes(b"".join(lines), dice))

        def use(mutant=mutant):
            examples = load_examples(str(mutant), "train", tokenizer, config, None)
            for ids, labels in map(examples.tokens, range(len(examples))):
                assert len(ids) == len(labels) <= 64 and all(0 <= token < 259 for token in ids)

        seen[outcome(use)] += 1
    print(seen)
    assert seen["refused"] > MUTANTS // 4 and seen["loaded"] > 0


def test_the_mutants_are_three_hundred_or_more():
    assert 3 * MUTANTS >= 300


def test_a_pickle_under_any_of_the_names_is_never_loaded(session, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    import pickle

    _, run = session
    for name in ("manifest.json", "state.json", "tensors_00001.safetensors"):
        mutant = tmp_path / name / "step_000006"
        shutil.copytree(run.checkpoints / "step_000006", mutant)
        (mutant / name).write_bytes(pickle.dumps(Bomb()))
        assert checkpoint_files.inspect(mutant).problem
    bad = tmp_path / "bad.safetensors"
    torch.save({"a": Bomb()}, bad)
    with pytest.raises(SafetensorError):
        load_file(bad)
    assert not (tmp_path / "exploded").exists()
