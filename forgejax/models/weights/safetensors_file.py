"""The safetensors format: read by memory map, written tensor by tensor, so that no file is ever whole in memory.

A file is eight bytes of header length (little endian), a JSON header of ``{name: {dtype, shape, data_offsets}}``, and
the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from forgejax.errors import CheckpointError

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ADVICE = "copy the file again"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies in a file: bytes ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One file, mapped read-only. Raises CheckpointError where it is damaged or cut short."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path} cannot be read: {error}; {_ADVICE}") from error
        self.entries = _header(path, self._map)

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """A view of rows ``start`` to ``stop`` of a tensor. Raises CheckpointError for a dtype nobody computes in."""
        entry = self.entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of dtype {entry.dtype}; supported: {', '.join(_DTYPES)} "
                "(no quantized weights)"
            )
        flat = np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.start)
        return flat.reshape(entry.shape)[start:stop]

    def release(self) -> None:
        """Gives the pages read so far back to the system; they stay in its file cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _header(path: Path, data: mmap.mmap) -> dict[str, Entry]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise CheckpointError(
            f"{path} has {len(data)} bytes and is no whole safetensors file: its header would end at byte {8 + size}; "
            f"{_ADVICE}"
        )
    try:
        raw = json.loads(data[8 : 8 + size])
        entries = {
            name: Entry(
                dtype=str(value["dtype"]),
                shape=tuple(int(each) for each in value["shape"]),
                start=8 + size + int(value["data_offsets"][0]),
                stop=8 + size + int(value["data_offsets"][1]),
            )
            for name, value in raw.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file: its header cannot be read ({error}); {_ADVICE}"
        ) from error
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        wrong_size = dtype is not None and entry.stop - entry.start != math.prod(entry.shape) * dtype.itemsize
        if entry.stop > len(data) or entry.start < 8 + size or wrong_size:
            raise CheckpointError(
                f"{path} is damaged or cut short: tensor {name} {entry.dtype}{list(entry.shape)} would lie in bytes "
                f"{entry.start} to {entry.stop} of {len(data)}; {_ADVICE}"
            )
    return entries


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[Planned], limit: int) -> list[list[Planned]]:
    """Splits tensors, in order, over files of at most ``limit`` bytes (a larger tensor gets a file of its own)."""
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_safetensors(path: Path, tensors: list[Planned], values: Iterator[NDArray[Any]]) -> None:
    """Writes one file; ``values`` gives the tensors in the same order, one at a time, and it is on the disk after."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks of a file it loads
    offset = 0
    for tensor in tensors:
        name = _NAMES[tensor.dtype]
        header[tensor.name] = {
            "dtype": name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(tensors, values, strict=True):
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name}: {value.dtype}{value.shape} given, planned {tensor.dtype}{tensor.shape}"
                )
            file.write(np.ascontiguousarray(value).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def index_of(files: Mapping[str, list[Planned]]) -> dict[str, Any]:
    """What ``model.safetensors.index.json`` says of tensors over several files."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensors in files.values() for tensor in tensors)},
        "weight_map": {tensor.name: file for file, tensors in files.items() for tensor in tensors},
    }
