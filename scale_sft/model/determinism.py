"""Runs that repeat bit for bit on a GPU as well: torch's deterministic algorithms, for as long as a run takes.

Under them torch's flash and memory-efficient attention have a backward pass of one order, cuDNN's is not chosen, and an
operation that has no deterministic version raises. On a CPU runs repeat anyway, with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scale_sft.config.options import Config
from scale_sft.errors import UserError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
"""With any other value cuBLAS may sum in a new order each time. It reads the value when a process first uses a GPU."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Compute deterministically inside the block, if `wanted`; afterwards all settings are what they were.

    Raises:
        UserError: this process has used a GPU already, without the setting that cuBLAS needs.
    """
    if not wanted:
        yield
        return
    environment = os.environ.get(_WORKSPACE)
    if environment not in _REPEATABLE_WORKSPACES and torch.cuda.is_initialized():
        raise UserError(
            f"deterministic: got true in a process that has used its GPU with {_WORKSPACE}={environment}, expected "
            f"{' or '.join(_REPEATABLE_WORKSPACES)} before that. Fix: {_WORKSPACE}=:4096:8 in the environment of python"
        )
    memory: Any = torch.utils.deterministic
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, cuda.cudnn_sdp_enabled(), memory.fill_uninitialized_memory
    try:
        if environment not in _REPEATABLE_WORKSPACES:
            os.environ[_WORKSPACE] = _REPEATABLE_WORKSPACES[0]
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        cuda.enable_cudnn_sdp(False)
        memory.fill_uninitialized_memory = False  # nothing here reads memory before it is written
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark = flags[:2]
        cuda.enable_cudnn_sdp(flags[2])
        memory.fill_uninitialized_memory = flags[3]
        if environment is None:
            os.environ.pop(_WORKSPACE, None)
        else:
            os.environ[_WORKSPACE] = environment


def refuse_unrepeatable(config: Config, device: torch.device) -> None:
    """Refuse options whose bits may differ from run to run on a GPU, if the run is to be deterministic.

    Raises:
        UserError: names the option and what to choose instead.
    """
    if not config.run.deterministic or device.type == "cpu":
        return
    for name, value, others, why in (
        ("attention", config.model.attention, ("auto", "sdpa", "eager"), "torch does not vouch for its backward pass"),
        ("compile", config.model.compile, ("off",), "graphs are tuned for the first inputs they meet"),
    ):
        if value not in others:
            raise UserError(
                f"deterministic: got true with {name} {value}, expected {name} {' or '.join(others)}: {why}. "
                f"Fix: --{name} {others[0]}"
            )
