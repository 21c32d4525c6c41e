"""Read and write safetensors files one tensor at a time, without mapping the file into memory.

The safetensors library maps whole files, which counts against an address-space limit (ulimit -v), and writes a file
only from all its tensors at once; here neither reading nor writing needs more memory than the tensor at hand.
The format: 8 bytes of header length, a JSON header (dtype, shape, offsets by name), then the bytes in header order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


class TensorReader:
    """One safetensors file, open; use it in a `with` block.

    Raises:
        UserError: the file is missing, cut short or not of the format.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb")
            size = path.stat().st_size
            length = int.from_bytes(self._file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header is cut short")
            header = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {"format": "pt"}
            self._entries: dict[str, Any] = header
            self._start = 8 + length
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                expected = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
                if last - first != expected or not 0 <= first <= last <= size - self._start:
                    raise ValueError(f"'{name}' is not within it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def start(self) -> int:
        """The offset of the data in the file, in bytes."""
        return self._start

    @property
    def names(self) -> list[str]:
        """Tensors in the order of their bytes."""
        return sorted(self._entries, key=lambda name: self._entries[name]["data_offsets"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entries[name]["dtype"]]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def tensor(self, name: str) -> Tensor:
        """Read a copy of one tensor, on the CPU."""
        first, last = self._entries[name]["data_offsets"]
        if first == last:
            return torch.empty(self.shape(name), dtype=self.dtype(name))
        raw = torch.empty(last - first, dtype=torch.uint8)
        self._file.seek(self._start + first)
        if self._file.readinto(raw.numpy().data) != last - first:
            raise UserError(f"{self.path} ends within '{name}'")
        return raw.view(self.dtype(name)).view(self.shape(name))


class TensorWriter:
    """A safetensors file whose names, dtypes and shapes are known; tensors are written one by one, in any order.

    Args:
        specs: (dtype, shape) by name. Wide dtypes come first in the file, as the format's alignment wants it.
        start: where the data should start, up to multiples of 64. A file that is mapped into memory gives its tensors
            the alignment that they have in the file, and some CPU kernels sum in another order for another alignment.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        start: int = 0,
    ):
        self._specs, self._offsets, self._missing = dict(specs), {}, set(specs)
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        place = 0
        for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
            dtype, shape = specs[name]
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
            self._offsets[name] = place
            place += size
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * ((start - 8 - len(text)) % 64)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            if self._missing:
                raise ValueError(f"never written: {sorted(self._missing)[:3]}")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the dtype and shape given in `specs`."""
        if (tensor.dtype, tuple(tensor.shape)) != self._specs[name]:
            raise ValueError(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, promised was {self._specs[name]}")
        self._file.seek(self._start + self._offsets[name])
        if tensor.numel():
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)
