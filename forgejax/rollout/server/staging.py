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
from forgejax.rollout.engine.weights import check_version
from forgejax.rollout.server.manifest import Manifest, check_manifest, join_leaves

WEIGHTS_FILE = "weights.safetensors"


class Staging:
    """One set of weights on its way in. For one thread at a time.

    Nothing is served of it before ``join``, so whatever fails here leaves the version that is served as it is.
    ``transfer`` names it.
    """

    def __init__(self, manifest: Manifest, like: Any):
        """Raises EngineError for weights of another model than ``like``, the tree of shapes that is served, and for a
        version that tokens cannot carry."""
        check_version(manifest.version)
        check_manifest(manifest, like)
        self.transfer = uuid.uuid4().hex
        self.version = manifest.version
        self._like = like
        self._notes = [note for note in manifest.tensors if note.size]
        self._empty = {note.name: note.make() for note in manifest.tensors if not note.size}
        self._arrays: dict[str, np.ndarray] = {}
        self._size = sum(note.size for note in manifest.tensors)
        self._received = 0  # bytes
        self._at, self._start = 0, 0  # the tensor that is being received, and its first byte

    def write(self, offset: int, data: bytes, checksum: int) -> None:
        """The next bytes of all tensors one behind another, in the order of the manifest.

        Raises EngineError for any but those that were sent.
        """
        where = f"version {self.version}, byte {offset}"
        if zlib.crc32(data) != checksum:
            raise EngineError(f"{where}: {len(data)} bytes arrived with another checksum than they were sent with")
        if offset != self._received or offset + len(data) > self._size:
            raise EngineError(f"{where}, {len(data)} bytes: expected byte {self._received} next, of {self._size}")
        rest = np.frombuffer(data, np.uint8)
        while len(rest):
            note, begin = self._notes[self._at], self._received - self._start
            if note.name not in self._arrays:
                self._arrays[note.name] = note.make()
            count = min(len(rest), note.size - begin)
            _view_bytes(self._arrays[note.name])[begin : begin + count] = rest[:count]
            self._received, rest = self._received + count, rest[count:]
            if begin + count == note.size:
                self._at, self._start = self._at + 1, self._received

    def load(self, folder: Path, checksums: Mapping[str, int]) -> None:
        """All tensors out of a folder that the sender has written. Raises EngineError."""
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
                for note in self._notes:
                    array = note.make()
                    np.copyto(array, file.get_tensor(note.name), casting="no")
                    self._arrays[note.name] = array
                    if zlib.crc32(_view_bytes(array).data) != checksums.get(note.name):
                        raise EngineError(
                            f"version {self.version}, tensor {note.name} in {folder}: another checksum than it was "
                            "written with"
                        )
            self._received = self._size
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise EngineError(f"version {self.version} cannot be read from {folder}: {error}") from error

    def join(self) -> Any:
        """The whole tree, as arrays of the host. Raises EngineError while something of it is missing."""
        if self._received != self._size:
            raise EngineError(
                f"version {self.version} cannot be served: {self._received} of its {self._size} bytes have arrived"
            )
        return join_leaves(self._arrays | self._empty, self._like)


def _view_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
