"""A trainer and a rollout server in two processes: after every sync the server computes the trainer's logits."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rollout import PROMPT
from trainers import Trainer

from scale_sft import sync

SYNCS, RESTART_AT, SKIP_AT = 210, 120, 60
PATIENCE_SECONDS = 60


class Server:
    """A rollout process; what it does not answer in time fails the test."""

    def __init__(self, folder: Path):
        self.connection, theirs = multiprocessing.Pipe()
        descriptor = theirs.fileno()
        command = [sys.executable, str(Path(__file__).with_name("rollout.py")), str(folder), str(descriptor)]
        self.process = subprocess.Popen(command, pass_fds=[descriptor])
        theirs.close()
        assert self.receive() == "ready"

    def receive(self):
        assert self.connection.poll(PATIENCE_SECONDS), "the rollout server does not answer"
        return self.connection.recv()

    def sync(self, data: bytes) -> tuple[int, str, bytes, int]:
        self.connection.send_bytes(data)
        return self.receive()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        self.connection.close()


def logits_of(trainer: Trainer) -> bytes:
    with torch.inference_mode():
        return trainer.model(input_ids=PROMPT).logits.view(torch.uint8).numpy().tobytes()


@pytest.mark.timeout(240)
def test_a_rollout_server_follows_two_hundred_syncs_and_a_restart_bit_for_bit(tiny_model) -> None:
    folder = tiny_model("llama", "bfloat16")
    trainer = Trainer(folder, total_steps=SYNCS, update_interval_steps=3)
    server = Server(folder)
    generated, seen = 0, set()
    try:
        for number in range(1, SYNCS + 1):
            trainer.step()
            patches = sync.changed(trainer.sparse)
            if number == SKIP_AT:  # this one is lost
                continue
            if number == RESTART_AT:
                server.kill()
                server = Server(folder)
            version, error, logits, generated = server.sync(patches.to_bytes())
            if number in (SKIP_AT + 1, RESTART_AT):
                assert "sync.full(model)" in error and version < number
                patches = sync.full(trainer.sparse)
                version, error, logits, generated = server.sync(patches.to_bytes())
            assert (version, error) == (patches.version, "")
            assert logits == logits_of(trainer)
            seen.add(logits)
    finally:
        server.kill()
    assert len(seen) > 0.9 * SYNCS and generated > SYNCS  # the weights did change, and it did generate meanwhile
