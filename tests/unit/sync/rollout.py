"""A rollout server as a process of its own: it generates without end, and takes patches between two tokens.

    python rollout.py FOLDER FD      messages of `multiprocessing.connection` on the file descriptor

It answers each patch with (version, digest or error, bytes of its logits for a prompt, tokens generated so far).
"""

import sys
from multiprocessing.connection import Connection

import torch
from transformers import AutoModelForCausalLM

from scale_sft import sync

PROMPT = torch.tensor([[7, 3, 200, 45]])
LEAST = 3
"""Tokens between two patches, however busy the machine is."""


def main(folder: str, descriptor: int) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    connection = Connection(descriptor)
    connection.send("ready")
    tokens = PROMPT
    generated = 0
    with torch.inference_mode():
        while True:
            wanted = generated + LEAST
            while generated < wanted or not connection.poll(0.002):  # leave the trainer its share of the processor
                tokens = torch.cat((tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)), 1)[:, -8:]
                generated += 1
            try:
                error = ""
                sync.apply(model, connection.recv_bytes())
            except EOFError:
                return
            except sync.SyncError as problem:
                error = str(problem)
            logits = model(input_ids=PROMPT).logits
            connection.send((sync.version(model), error, logits.view(torch.uint8).numpy().tobytes(), generated))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
