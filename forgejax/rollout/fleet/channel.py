"""The way of new weights to servers: pushed in phases, checked byte by byte, served by nobody who has not all of them.

The trainer pushes, for it alone knows when a version is whole, who needs it and who failed: servers need no way back to
it, and what it sends next waits for what it sent last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors.numpy import save_file

from forgejax.errors import EngineError
from forgejax.rollout.server.manifest import Manifest, make_manifest, name_leaves
from forgejax.rollout.server.staging import WEIGHTS_FILE

_CHUNK = 8 << 20
serials = itertools.count(1)
"""Of all publications of this process."""


class Staged(Protocol):
    """One version of the weights on its way to servers. Two of the same version are two, by their ``serial``."""

    @property
    def serial(self) -> int: ...

    @property
    def version(self) -> int: ...

    async def stage(self, receiver: WeightReceiver, *, within_s: float) -> str:
        """Brings all of it to a server, which does not serve it yet; gives the transfer to commit.

        Raises EngineError.
        """
        ...

    def drop(self) -> None:
        """Nobody will be brought it any more. Idempotent."""
        ...


class WeightReceiver(Protocol):
    """A server as the channel knows it; ``RemoteEngine`` is one."""

    async def begin(self, manifest: Manifest) -> str: ...
    async def write(self, transfer: str, offset: int, data: bytes, checksum: int) -> None: ...
    async def load(self, transfer: str, folder: str, checksums: dict[str, int], *, within_s: float) -> None: ...
    async def commit(self, transfer: str, *, within_s: float) -> None: ...
    async def abort(self, transfer: str) -> None: ...


class Publication:
    """``Staged``: the weights copied to the host, and sent from there; whoever made it may donate its buffers.

    Two of the same version are two publications. With a ``folder`` the tensors lie there as well, in a folder of their
    own, until ``drop``. Raises EngineError where they cannot be written.
    """

    def __init__(self, params: Any, version: int, folder: Path | None = None):
        self.serial = next(serials)
        self.manifest = make_manifest(params, version)
        leaves = name_leaves(params)
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._arrays = {name: np.array(leaf, order="C", copy=True) for name, leaf in leaves.items()}
        self.folder: Path | None = None
        self.checksums: dict[str, int] = {}
        if folder is not None:
            self.folder = folder.absolute() / f"{self.serial}-{version}"
            self._write(self.folder)

    @property
    def version(self) -> int:
        return self.manifest.version

    def chunks(self) -> Iterator[tuple[int, bytes, int]]:
        """The bytes of all tensors one behind another, in pieces: offset, bytes, and CRC-32 of these."""
        offset, pieces, held = 0, [], 0
        for note in self.manifest.tensors:
            data = _view(self._arrays[note.name])
            while len(data):
                piece, data = data[: _CHUNK - held], data[_CHUNK - held :]
                pieces.append(piece)
                held += len(piece)
                if held == _CHUNK:
                    chunk = b"".join(pieces)
                    yield offset, chunk, zlib.crc32(chunk)
                    offset, pieces, held = offset + held, [], 0
        if held:
            chunk = b"".join(pieces)
            yield offset, chunk, zlib.crc32(chunk)

    async def stage(self, receiver: WeightReceiver, *, within_s: float) -> str:
        """See ``Staged``; where it fails, the server forgets what it got."""
        return await stage(self, receiver, within_s=within_s)

    def drop(self) -> None:
        """Nobody needs the folder any more. Idempotent."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        self.checksums = {name: zlib.crc32(_view(array)) for name, array in self._arrays.items()}
        try:
            folder.mkdir(parents=True)
            save_file(self._arrays, folder / WEIGHTS_FILE)
        except OSError as error:
            raise EngineError(
                f"the weights of version {self.version} cannot be written to {folder}: {error}; make room there, or "
                "leave rollout.weights_folder out"
            ) from error


async def stage(publication: Publication, receiver: WeightReceiver, *, within_s: float) -> str:
    """Brings all of a publication to a server, which does not serve it yet; gives the transfer to commit.

    Raises EngineError, and has the server forget what it got.
    """
    transfer = ""
    try:
        async with asyncio.timeout(within_s):
            transfer = await receiver.begin(publication.manifest)
            if publication.folder is not None:
                await receiver.load(transfer, str(publication.folder), publication.checksums, within_s=within_s)
            else:
                chunks = publication.chunks()
                while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                    await receiver.write(transfer, *chunk)
    except (TimeoutError, EngineError) as error:
        if transfer:
            with contextlib.suppress(EngineError):
                await receiver.abort(transfer)
        if isinstance(error, EngineError):
            raise
        raise EngineError(f"version {publication.version} has not arrived within {within_s:g} s") from error
    return transfer


def _view(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
