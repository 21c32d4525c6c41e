"""Compile the C kernels for this machine's CPU on first use.

Like torch's own compiled operations they need a C compiler: gcc, whose OpenMP runtime torch has loaded. Without one,
plain torch does their work.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
COMPILE_SECONDS = 60
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
SOURCES = {
    "sampled_columns.c": ("-ffp-contract=fast",),
    "drop_grow.c": ("-ffp-contract=off",),
    "topk.c": (),
    "updates.c": ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
}
"""Extra compiler flags by file. Updates round each operation; their square roots do not set errno."""

POINTER, LONG, FLAG, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class NoCompiler(RuntimeError):
    """The reason that the C code cannot be used here."""


class Target(ctypes.Structure):
    """`struct target` of updates.c: the places of the entries, and the part of the weight to write."""

    _fields_ = [
        ("row_starts", POINTER), ("columns", POINTER), ("wide", FLAG), ("rows", LONG), ("width", LONG),
        ("weight", POINTER), ("base", POINTER), ("halves", FLAG), ("start", LONG), ("size", LONG), ("first", LONG),
    ]  # fmt: skip


SIGNATURES = {
    "words_per_column": (),
    "column_products": (POINTER, POINTER, LONG, LONG, LONG, FLAG, FLAG, POINTER, POINTER, FLAG, POINTER, POINTER, FLAG),
    "exchange_by_gradient": (
        *(POINTER, POINTER, LONG, POINTER, POINTER, LONG, LONG),
        *(POINTER, POINTER, POINTER, POINTER, POINTER, POINTER),
    ),
    "exchange_by_accumulators": (
        *(POINTER, POINTER, LONG, POINTER, POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG),
        *(POINTER, POINTER, POINTER, POINTER, POINTER),
    ),
    "counting_words": (),
    "top_k_magnitude": (POINTER, FLAG, LONG, LONG, POINTER, POINTER, POINTER, FLAG),
    "adamw_write": (
        *(LONG, POINTER, FLAG, POINTER, FLAG, POINTER, FLAG, POINTER, POINTER, FLAG, POINTER, POINTER),
        *(FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, ctypes.POINTER(Target), FLAG),
    ),
    "sm3_write": (
        *(POINTER, FLAG, POINTER, FLAG, POINTER, POINTER, POINTER),
        *(FLOAT, FLOAT, FLOAT, ctypes.POINTER(Target), FLAG),
    ),
}


def library() -> ctypes.CDLL:
    """Compile and load all sources, once per process. Nothing stays on disk.

    Raises:
        NoCompiler: there is no compiler, or its output cannot be loaded.
    """
    made = _made()
    if isinstance(made, NoCompiler):
        raise NoCompiler(str(made))
    return made


def asked_for(device: torch.device, kernels: str) -> bool:
    """Return True if a run with this option `kernels` wants these kernels on a device, if they are available."""
    return device.type == "cpu" and kernels != "off"


def used(device: torch.device, kernels: str) -> bool:
    """Return True if these kernels are requested and available."""
    return asked_for(device, kernels) and why_not() is None


def why_not() -> str | None:
    """Explain why there are no kernels for this CPU; None if there are."""
    made = _made()
    return str(made) if isinstance(made, NoCompiler) else None


@lru_cache(maxsize=1)
def _made() -> ctypes.CDLL | NoCompiler:
    try:
        loaded = _compiled(shlex.split(os.environ.get("CC", "")) or ["cc"])
    except NoCompiler as error:
        return error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no reason given"])[0]
        return NoCompiler(f"the C compiler '{error.cmd[0]}' failed: {said}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # no folder, load failed, no command, too slow
        return NoCompiler(f"{type(error).__name__}: {error}")
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.words_per_column.restype = loaded.counting_words.restype = loaded.exchange_by_gradient.restype = LONG
    return loaded


def _compiled(compiler: Sequence[str]) -> ctypes.CDLL:
    if shutil.which(compiler[0]) is None:
        raise NoCompiler(f"there is no C compiler '{compiler[0]}' (set CC to one)")
    with tempfile.TemporaryDirectory(prefix="scale-sft-") as folder:
        objects = {source: f"{folder}/{source}.o" for source in SOURCES}
        linked = f"{folder}/kernels.so"
        commands = [
            [*compiler, *FLAGS, *SOURCES[source], "-c", str(FOLDER / source), "-o", to]
            for source, to in objects.items()
        ]
        # Linking with -fopenmp would load a second OpenMP runtime, whose threads would compete with torch's own.
        commands.append([*compiler, "-shared", *objects.values(), "-o", linked])
        for command in commands:
            subprocess.run(
                command, check=True, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS
            )
        return ctypes.CDLL(linked)


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """Take the address of each tensor's data; the tensors must outlive its use."""
    return (POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
