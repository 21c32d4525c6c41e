"""Ranks that disagree are found and named; a rank that dies takes the others with it; the base is really sharded."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scale_sft.model.loading import base_location
from tests.candidate_cases import KINDS

from . import probe
from .conftest import ROOT, STRICT, command, environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def error_of(text):
    [error] = [line for line in text.splitlines() if line.startswith("error:")]
    return error


def test_a_planted_difference_on_one_rank_is_caught_and_named(on_ranks, tmp_path):
    statuses, text = on_ranks(2, False, probe.planted, str(tmp_path))
    assert statuses[0] == 1
    error = error_of(text)
    assert "differs on rank 1" in error
    weight = error.split("planted in ")[1].rstrip("]")
    assert f"{weight} differs" in error


def test_ranks_that_come_with_different_configurations_do_not_train(on_ranks, tmp_path):
    statuses, text = on_ranks(2, False, probe.differing, str(tmp_path))
    assert statuses[0] == 1
    assert error_of(text).startswith("error: ranks disagree on their inputs: the configuration differs on rank 1")


def test_a_gradient_that_is_no_number_on_one_rank_stops_all_with_one_message(on_ranks, tmp_path):
    """While candidates are proposed, the one moment at which ranks exchange more than a sum."""
    statuses, text = on_ranks(2, False, probe.broken, str(tmp_path))
    assert statuses[0] == 1
    error = error_of(text)
    assert error.startswith("error: step 4: the loss is ")
    assert "the gradient norm nan at learning rate" in error and "the deltas of step 3 are saved" in error
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_choose_the_candidates_that_one_would_choose_from_the_sum_in_pieces_of_any_size(
    on_ranks, tmp_path, ranks
):
    statuses, text = on_ranks(ranks, False, probe.proposing, str(tmp_path))
    assert statuses == [0] * ranks, text[-4000:]
    for rank in range(ranks):
        found = json.loads((tmp_path / f"proposed{rank}.json").read_text())
        wrong = [row for row in found if not (row["as alone"] and row["as gathered"] and row["as planned"])]
        assert len(found) == 7 * len(KINDS) and not wrong, (rank, wrong)


def test_the_loss_of_a_sharded_base_needs_no_whole_logits(on_ranks, tmp_path):
    """With weights gathered and released as it goes, also where one rank has nothing to predict."""
    statuses, text = on_ranks(2, True, probe.losing, str(tmp_path))
    assert statuses == [0, 0], text[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"losses{rank}.json").read_text())
        assert [targets > 0 for targets, *_ in found] == [True, True, rank == 0]
        for targets, of_losses, of_gradients, gradient in found:
            assert of_losses <= 1e-5 * targets and of_gradients <= 1e-5 * gradient, found


def test_a_rank_holds_half_of_the_base_and_never_much_more(tmp_path, hf_home):
    """Under a launcher: how memory is given back has to be settled before Python starts."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="60MB")
    AutoTokenizer.from_pretrained(base_location("demo")).save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2, "the base must come in several files"
    done = subprocess.run(
        command(2, True, "tests/distributed/probe.py", "memory", str(tmp_path)),
        cwd=ROOT, env=environment(hf_home) | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"memory{rank}.json").read_text())
        print({key: value / 2**20 for key, value in seen.items()})
        base, slack = seen["base"], 40 * 2**20
        assert seen["settled"] < base / 2 + seen["state"] + slack
        assert seen["load_peak"] < 0.75 * base + slack
        assert seen["after_training"] < base / 2 + 8 * seen["state"] + 2 * slack
        assert seen["gathered"] == 0


def ranks_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Process ids of the ranks that a launcher started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            settings = dict(item.split("=", 1) for item in (entry / "environ").read_text().split("\0") if "=" in item)
            parents = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if "LOCAL_RANK" in settings and int(parents[1]) == launcher.pid:
            found[int(settings["LOCAL_RANK"])] = int(entry.name)
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_rank_that_dies_ends_the_run_within_a_minute_and_is_named(tmp_path, hf_home, sharded):
    run = tmp_path / "run"
    options = ["--density", "0.03", "--steps", "100000", "--log_every_steps", "1", "--output_dir", str(run)]
    options += ["--dtype", "float32"] + (["--base_placement", "shard", "--ds_config", STRICT] if sharded else [])
    log = (tmp_path / "log").open("w")
    launcher = subprocess.Popen(
        command(2, sharded, "scale_sft/train.py", *options), cwd=ROOT, env=environment(hf_home), stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or '"step": 3' not in (run / "metrics.jsonl").read_text():
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        began = time.monotonic()
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        status = launcher.wait(timeout=60)
        print(f"ended after {time.monotonic() - began:.1f} s")
    finally:
        launcher.kill()
        launcher.wait()
    text = (tmp_path / "log").read_text()
    assert status != 0
    assert "rank      : 1 (local_rank: 1)" in text and "exitcode  : -9" in text
