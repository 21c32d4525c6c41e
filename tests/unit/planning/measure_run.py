"""Train in this process and print the peak of private memory of each run: python measure_run.py WARM_UP RUN... (JSON).

The libraries are warmed up by a small run first; what counts is what a run adds, in bytes of anonymous memory, until
its last step.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import sys
import threading
from pathlib import Path

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.model import cross_entropy, output_layer
from scale_sft.spiel import indices, settings
from scale_sft.training import lifecycle as outcome


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def peak_of(options: dict) -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    train.run_training(load(None, options))
    done.set()
    thread.join()
    return peak - before


if __name__ == "__main__":
    outcome.finish = lambda *arguments: None
    cross_entropy.CPU_LOGITS = cross_entropy.GPU_LOGITS  # plans are made for GPUs
    output_layer.CPU_CHUNK = output_layer.GPU_CHUNK
    indices.PIECE_ENTRIES = indices.DEVICE_PIECE_ENTRIES
    settings.Backends.__init__ = functools.partialmethod(settings.Backends.__init__, together=True)
    warm_up, *runs = (json.loads(argument) for argument in sys.argv[1:])
    peak_of(warm_up)
    for run in runs:
        print("PEAK", peak_of(run), flush=True)
