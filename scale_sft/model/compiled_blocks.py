"""Decoder blocks under torch.compile, in training: all blocks of a class share one graph for each kind of input.

A block is compiled, not the model: compiling takes as long for 80 blocks as for one, and gradient checkpointing wraps
the compiled block, which it recomputes as a whole. Lengths and batch sizes are symbols of the graph. A class has one
graph without an attention mask and one with (batches with padding, packed rows), each again for a single sequence.
Evaluation and generation run the blocks as they are.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError, first_line

from .targets import block_of

BACKEND: Any = "inductor"
"""The backend of torch.compile, by name; tests put a function here, to count graphs."""

_GRAPHS = 32
"""The most graphs that a class of blocks may have; one more ends the run, so this is far more than it needs."""

Forward = Callable[..., Any]


def decoder_blocks(model: nn.Module, targets: Iterable[str]) -> list[nn.Module]:
    """Find the blocks of a model: the members of every list of modules that holds a target weight.

    Args:
        targets: names of target weights, such as 'model.layers.0.mlp.up_proj.weight'.
    """
    lists = dict.fromkeys(block.rpartition(".")[0] for name in targets if (block := block_of(name)))
    return [block for path in lists for block in model.get_submodule(path).children()]


def compile_blocks(blocks: Iterable[nn.Module], as_they_are: Callable[[], bool] = lambda: False) -> None:
    """Compile blocks, each class once, when they are first called with gradients enabled.

    Args:
        blocks: whose forward passes take the hidden states [B, L, H] first.
        as_they_are: asked before each call; True: run the block without its graph. It must not change between a forward
            pass and its backward pass.
    """
    compiled: dict[type, Forward] = {}
    limit: Any = (
        {"recompile_limit": _GRAPHS} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
    )
    for block in blocks:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=BACKEND, fullgraph=True, **limit)
        _route(block, compiled[kind], as_they_are)


def _route(block: Any, graph: Forward, as_they_are: Callable[[], bool]) -> None:
    """Send a block's training forward passes through its class's graph; hooks around `forward` stay in place."""
    stock = block.forward

    def forward(block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or as_they_are():
            return stock(hidden, *args, **kwargs)
        if not hidden.requires_grad:  # in the first block, which would need a graph of its own
            hidden = hidden.detach().requires_grad_()
        _let_sizes_vary(hidden, args, kwargs)
        try:
            return graph(block, hidden, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"compile: {type(block).__name__} does not compile into one graph here: {first_line(error)}. "
                "Fix: --compile off"
            ) from error

    block.forward = types.MethodType(forward, block)


def _let_sizes_vary(*inputs: Any) -> None:
    """Make every size of every tensor a symbol, unless the block itself fixes it: widths, and sizes of 1."""
    for value in inputs:
        if isinstance(value, Tensor):
            torch._dynamo.maybe_mark_dynamic(value, list(range(value.dim())))
        elif isinstance(value, tuple | list):
            _let_sizes_vary(*value)
        elif isinstance(value, dict):
            _let_sizes_vary(*value.values())


def refuse_uncompilable(device: torch.device, *, sharded: bool, attention: str) -> None:
    """Refuse to compile blocks where it cannot work, before anything is loaded.

    Raises:
        UserError: the base is cut into shards, whose weights hooks gather inside a block; attention compiles itself;
            or there is no compiler.
    """
    if sharded:
        raise UserError(
            "compile: got blocks, expected off on a base in shards, as DeepSpeed gathers weights inside each block. "
            "Fix: --base_placement replicate, or --compile off"
        )
    if attention == "flex_attention":
        raise UserError(
            "compile: got blocks with attention flex_attention, which compiles itself. Fix: --attention sdpa"
        )
    if reason := _why_no_compiler(device):
        raise UserError(f"compile: got blocks, but {reason}. Fix: install one, or --compile off")


def _why_no_compiler(device: torch.device) -> str | None:
    """Say which compiler of the graphs' code is missing; None: it is there."""
    if BACKEND != "inductor":
        return None
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is missing or does not know this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "this machine has no C++ compiler (g++, or the one named by CXX)"
    return None
