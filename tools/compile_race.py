"""What option compile is worth on this machine: steps with blocks as they are and compiled, in turn, in one process.

python tools/compile_race.py BASE [--dtype bfloat16] [--tokens 256] [--rows 4] [--rounds 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import scale_sft
from scale_sft.model.compiled_blocks import compile_blocks, decoder_blocks


def main() -> None:
    """Race, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=256, help="of each row")
    parser.add_argument("--rows", type=int, default=4, help="of each batch")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    torch.manual_seed(0)
    sides = {name: prepared(asked, compiled=name == "compiled") for name in ("as they are", "compiled")}
    first = {name: timed(*side, asked)[1] for name, side in sides.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(asked.rounds):
        for name in sorted(sides, reverse=number % 2 == 1):
            rounds[name].append(timed(*sides[name], asked))
    print(f"{asked.base} {asked.dtype} {asked.rows} x {asked.tokens} tokens, {torch.get_num_threads()} threads")
    for name, times in rounds.items():
        passes, whole = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        print(f"{name:12}  first step {first[name]:6.1f} s  passes {passes:8.1f} ms  whole step {whole:8.1f} ms")
    ratios = [mine[1] / theirs[1] for mine, theirs in zip(rounds["compiled"], rounds["as they are"], strict=True)]
    quarter = statistics.quantiles(ratios, n=4)
    print(f"compiled / as they are, whole step: {quarter[1]:.3f} (middle half {quarter[0]:.3f} to {quarter[2]:.3f})")


def prepared(asked: argparse.Namespace, *, compiled: bool) -> tuple[Any, Any]:
    """Make a model with deltas, and its optimizer."""
    model = AutoModelForCausalLM.from_pretrained(asked.base, dtype=getattr(torch, asked.dtype)).train()
    sparse = scale_sft.attach(model, density=0.02, total_steps=asked.rounds + 1)
    if compiled:
        compile_blocks(decoder_blocks(model, sparse.shapes))
    return model, sparse.optimizer(lr=1e-3)


def timed(model: Any, optimizer: Any, asked: argparse.Namespace) -> tuple[float, float]:
    """Take a step: seconds of both passes, and of all of it."""
    ids = torch.randint(0, model.config.vocab_size, (asked.rows, asked.tokens))
    began = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    passed = time.perf_counter()
    optimizer.step()
    return passed - began, time.perf_counter() - began


if __name__ == "__main__":
    main()
