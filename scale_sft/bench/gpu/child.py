"""The process of one section: imports, waits for its turn, measures, and reports each row at once."""

from __future__ import annotations

import os
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .lab import Lab, Sizes, Skipped
from .sections import Section

BEGIN = "begin"
ROW, SKIPPED, FAILED, DONE = "row", "skipped", "failed", "done"
"""Kinds of messages to the campaign: (kind, what, figures)."""

_LAST_LINES = 6  # of a traceback, for the row
_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Order:
    """What a section is to be measured on."""

    sizes: Sizes
    scratch: str
    on_gpu: bool


def serve(connection: Connection, section: Section, order: Order) -> None:
    """Run a section when the campaign says so. Its output goes to stderr."""
    os.setpgid(0, 0)  # ended together with the processes that it starts
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ.update(section.environment)
    if section.on_cpu or not order.on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from scale_sft.bench import contestants  # noqa: F401  # imports what takes long, while another section measures
    from scale_sft.bench.device import this_device
    from scale_sft.bench.rows import machine

    try:
        if connection.recv() != BEGIN:
            return
    except EOFError:
        return
    try:
        say = lambda what, figures: connection.send((ROW, what, figures))
        device = torch.device("cpu") if section.on_cpu or not order.on_gpu else this_device()
        connection.send(("machine", "", machine()))
        section.run(Lab(device, order.sizes, Path(order.scratch), say))
        connection.send((DONE, "", {}))
    except Skipped as reason:
        connection.send((SKIPPED, "", {"skipped": str(reason)}))
    except BaseException as error:  # reported, whatever it is: the next section must run
        lines = traceback.format_exc().strip().splitlines()[-_LAST_LINES:]
        connection.send((FAILED, "", {"failed": f"{type(error).__name__}: {error}"[:1500], "traceback": lines}))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, however that came about."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


Message = tuple[str, str, dict[str, Any]]
