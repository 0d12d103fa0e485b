"""Weights that arrive: kept in the host's memory, each byte checked, until all are there and may be served."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from forgejax.errors import EngineError
from forgejax.rollout.server.manifest import Manifest, check_manifest, join_leaves

WEIGHTS_FILE = "weights.safetensors"


class Staging:
    """One set of weights on its way in. For one thread at a time.

    Nothing is served of it before ``join``, so whatever fails here leaves the version that is served as it is.
    ``transfer`` names it.
    """

    def __init__(self, manifest: Manifest, like: Any):
        """Raises EngineError for weights of another model than ``like``, the tree of shapes that is served."""
        check_manifest(manifest, like)
        self.transfer = uuid.uuid4().hex
        self.version = manifest.version
        self._like = like
        self._notes = manifest.tensors
        self._arrays: dict[str, np.ndarray] = {}
        self._received = [0] * len(manifest.tensors)

    def write(self, number: int, offset: int, data: bytes, checksum: int) -> None:
        """The next bytes of tensor ``number`` of the manifest. Raises EngineError for any but those that were sent."""
        if not 0 <= number < len(self._notes):
            raise EngineError(f"tensor {number} was sent; version {self.version} has {len(self._notes)} of them")
        note, received = self._notes[number], self._received[number]
        where = f"version {self.version}, tensor {note.name}, byte {offset}"
        if zlib.crc32(data) != checksum:
            raise EngineError(f"{where}: {len(data)} bytes arrived with another checksum than they were sent with")
        if offset != received or offset + len(data) > note.size:
            raise EngineError(f"{where}: expected byte {received} next, of {note.size}")
        array = self._arrays.setdefault(note.name, note.make())
        _view_bytes(array)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self._received[number] += len(data)

    def load(self, folder: Path, checksums: Mapping[str, int]) -> None:
        """All tensors out of a folder that the sender has written. Raises EngineError."""
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
                for number, note in enumerate(self._notes):
                    array = note.make()
                    np.copyto(array, file.get_tensor(note.name), casting="no")
                    self._received[number] = note.size
                    self._arrays[note.name] = array
                    if zlib.crc32(_view_bytes(array).data) != checksums.get(note.name):
                        raise EngineError(
                            f"version {self.version}, tensor {note.name} in {folder}: another checksum than it was "
                            "written with"
                        )
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise EngineError(f"version {self.version} cannot be read from {folder}: {error}") from error

    def join(self) -> Any:
        """The whole tree, as arrays of the host. Raises EngineError while something of it is missing."""
        missing = [note.name for note, got in zip(self._notes, self._received, strict=True) if got != note.size]
        if missing:
            raise EngineError(
                f"version {self.version} cannot be served: {len(missing)} of its {len(self._notes)} tensors have not "
                f"arrived whole, {missing[0]} for one"
            )
        empty = {note.name: note.make() for note in self._notes if note.size == 0}
        return join_leaves(self._arrays | empty, self._like)


def _view_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
