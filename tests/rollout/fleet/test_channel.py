"""Laws of the way of weights to servers, with servers that fail in each phase of it."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout.fleet.channel import Publication, stage
from forgejax.rollout.server.manifest import Manifest
from forgejax.rollout.server.staging import Staging

WEIGHTS = {"a": np.arange(12, dtype=np.float32), "b": np.ones((2, 3), np.float32)}


class Receiver:
    """A server without a wire, which may fail in one phase."""

    def __init__(self, like: Any, *, fails: str = "", stalls: str = "") -> None:
        self.like, self.fails, self.stalls = like, fails, stalls
        self.staging: Staging | None = None
        self.told: list[str] = []

    async def begin(self, manifest: Manifest) -> str:
        await self._pass("begin")
        self.staging = Staging(manifest, self.like)
        return self.staging.transfer

    async def write(self, transfer: str, offset: int, data: bytes, checksum: int) -> None:
        await self._pass("write")
        assert self.staging is not None
        self.staging.write(offset, data, checksum)

    async def load(self, transfer: str, folder: str, checksums: dict[str, int], *, within_s: float) -> None:
        await self._pass("load")
        assert self.staging is not None
        self.staging.load(Path(folder), checksums)

    async def commit(self, transfer: str, *, within_s: float) -> None:
        await self._pass("commit")

    async def abort(self, transfer: str) -> None:
        await self._pass("abort")
        self.staging = None

    async def _pass(self, phase: str) -> None:
        self.told.append(phase)
        if phase == self.stalls:
            await asyncio.sleep(60)
        if phase == self.fails:
            raise EngineError(f"it fails in {phase}")


def same(given: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, given, expected)


@pytest.mark.parametrize("by_folder", [False, True])
async def test_what_arrives_is_what_was_sent_whatever_becomes_of_the_senders_buffers(
    by_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgejax.rollout.fleet.channel._CHUNK", 100)
    kinds = {"a": jnp.arange(90, dtype=jnp.float32).reshape(9, 10), "b": jnp.ones((3, 5), jnp.bfloat16)}
    params = {**kinds, "c": jnp.float32(7.0), "d": jnp.zeros((0, 4), jnp.float16)}
    publication = Publication(params, 5, tmp_path if by_folder else None)
    for leaf in params.values():
        leaf.delete()
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in params.items()}
    receiver = Receiver(like)
    await stage(publication, receiver, within_s=10.0)
    assert receiver.staging is not None and receiver.staging.version == 5
    arrived = receiver.staging.join()
    same(
        arrived,
        {"a": np.arange(90, dtype=np.float32).reshape(9, 10), "b": np.ones((3, 5)), "c": 7.0, "d": np.zeros((0, 4))},
    )
    assert arrived["b"].dtype == ml_dtypes.bfloat16
    assert receiver.told == (["begin", "load"] if by_folder else ["begin"] + ["write"] * 4)
    publication.drop()
    assert publication.folder is None or not publication.folder.exists()


@pytest.mark.parametrize("phase", ["begin", "write"])
async def test_a_server_that_fails_in_a_phase_is_told_to_forget_and_says_why(phase: str) -> None:
    receiver = Receiver(WEIGHTS, fails=phase)
    with pytest.raises(EngineError, match=f"it fails in {phase}"):
        await stage(Publication(WEIGHTS, 2), receiver, within_s=10.0)
    assert receiver.told[-1] == ("begin" if phase == "begin" else "abort") and receiver.staging is None


async def test_a_server_that_stalls_in_the_middle_of_a_chunk_does_not_hold_up_the_trainer() -> None:
    receiver = Receiver(WEIGHTS, stalls="write")
    with pytest.raises(EngineError, match=r"version 2 has not arrived within 0\.1 s"):
        await stage(Publication(WEIGHTS, 2), receiver, within_s=0.1)
    assert receiver.told == ["begin", "write", "abort"]


async def test_a_bit_that_turns_on_the_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver(WEIGHTS)
    write = receiver.write

    async def turn(transfer: str, offset: int, data: bytes, checksum: int) -> None:
        turned = bytes([data[0] ^ 1]) + data[1:]
        await write(transfer, offset, turned, checksum)

    monkeypatch.setattr(receiver, "write", turn)
    with pytest.raises(EngineError, match="arrived with another checksum"):
        await stage(Publication(WEIGHTS, 2), receiver, within_s=10.0)


def test_chunks_hold_the_tensors_one_behind_another_with_crc_32_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgejax.rollout.fleet.channel._CHUNK", 20)
    sent = np.arange(6, dtype="<f4").tobytes() + np.ones(3, "<f4").tobytes()  # 24 and 12 bytes
    publication = Publication({"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.float32)}, 0)
    assert list(publication.chunks()) == [
        (0, sent[:20], zlib.crc32(sent[:20])),
        (20, sent[20:], zlib.crc32(sent[20:])),
    ]
