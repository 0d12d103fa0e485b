"""Laws of weights in phases over HTTP, and of what a server says of itself."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import RequestLog
from forgejax.rollout.fleet.channel import Publication, stage
from forgejax.rollout.fleet.remote_engine import RemoteEngine
from forgejax.rollout.server.admin import PublishRoot
from forgejax.rollout.server.http import RolloutServer
from forgejax.rollout.server.manifest import make_manifest
from forgejax.rollout.server.served import ServedEngine
from forgejax.run.checkpoint import load_tree
from tests.rollout import tiny
from tests.rollout.driving import gap
from tests.rollout.serving import served, serving_engine


@asynccontextmanager
async def reached(
    version: int = 3, log: RequestLog | None = None, root: Path | None = None
) -> AsyncIterator[tuple[ServedEngine, RemoteEngine]]:
    publish_root = None if root is None else PublishRoot(root=root, read=load_tree)
    async with (
        serving_engine(tiny.params(1), version, log) as engine,
        served(RolloutServer(engine, publish_root).make_app()) as url,
        RemoteEngine(url) as remote,
    ):
        yield engine, remote


async def test_weights_are_served_when_they_are_committed_and_not_before() -> None:
    async with reached() as (engine, remote):
        transfer = await stage(Publication(tiny.params(2), 4), remote, within_s=30.0)
        before = await remote.sample(tiny.request("a", [1, 2, 3], 4))
        await remote.commit(transfer, within_s=30.0)
        after = await remote.sample(tiny.request("b", [1, 2, 3], 4))
        status = await remote.status()
        with pytest.raises(EngineError, match="there is no transfer"):
            await remote.commit(transfer, within_s=30.0)
    assert set(before.versions.tolist()) == {3} and gap(before, tiny.params(1)) < 1e-5
    assert set(after.versions.tolist()) == {4} and gap(after, tiny.params(2)) < 1e-5
    assert (status.version, status.publication, status.state) == (4, transfer, "serving")
    assert (status.sampled, status.returned, status.active) == (8, 8, 0) and status.instance == engine.instance


async def test_weights_go_through_a_folder_that_both_sides_see(tmp_path: Path) -> None:
    async with reached(root=tmp_path) as (engine, remote):
        publication = Publication(tiny.params(2), 4, tmp_path)
        await remote.commit(await stage(publication, remote, within_s=30.0), within_s=30.0)
        done = await remote.sample(tiny.request("b", [1, 2, 3], 4))
        torn = Publication(tiny.params(5), 5, tmp_path)
        torn.checksums = dict.fromkeys(torn.checksums, 0)
        with pytest.raises(EngineError, match="another checksum than it was written with"):
            await stage(torn, remote, within_s=30.0)
        torn.drop()
        with pytest.raises(EngineError, match="cannot be read from"):
            await stage(torn, remote, within_s=30.0)
        assert engine.version == 4
    assert gap(done, tiny.params(2)) < 1e-5
    async with reached() as (_, remote):
        with pytest.raises(EngineError, match="loads no weights from files"):
            await stage(publication, remote, within_s=30.0)


async def test_whatever_is_wrong_with_a_transfer_leaves_the_version_that_is_served() -> None:
    manifest = make_manifest(tiny.params(2), 9)
    async with reached() as (engine, remote):
        transfer = await remote.begin(manifest)
        with pytest.raises(EngineError, match="another checksum than they were sent with"):
            await remote.write(transfer, 0, b"1234", zlib.crc32(b"1235"))
        with pytest.raises(EngineError, match="expected byte 0 next"):
            await remote.write(transfer, 4, b"1234", zlib.crc32(b"1234"))
        size = sum(note.size for note in manifest.tensors)
        with pytest.raises(EngineError, match=f"expected byte 0 next, of {size}"):
            await remote.write(transfer, 0, bytes(size + 1), zlib.crc32(bytes(size + 1)))
        await remote.write(transfer, 0, b"1234", zlib.crc32(b"1234"))
        with pytest.raises(EngineError, match=f"4 of its {size} bytes have arrived"):
            await remote.commit(transfer, within_s=30.0)
        older = await remote.begin(manifest)
        newer = await remote.begin(manifest)
        with pytest.raises(EngineError, match=f"there is no transfer {older}"):
            await remote.write(older, 0, b"", 0)
        await remote.abort(newer)
        other = jax.tree.map(lambda leaf: np.zeros((*leaf.shape, 2), np.float32), tiny.params(2))
        with pytest.raises(EngineError, match=r"belong to another model: at \S+ given float32\[.*, 2\], expected"):
            await remote.begin(make_manifest(other, 9))
        done = await remote.sample(tiny.request("a", [1, 2, 3], 4))
        assert engine.version == 3
    assert gap(done, tiny.params(1)) < 1e-5


async def test_a_transfer_that_stands_still_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgejax.rollout.server.admin.STALL_S", 0.0)
    async with reached() as (_, remote):
        transfer = await remote.begin(make_manifest(tiny.params(2), 9))
        with pytest.raises(EngineError, match="stood still for 0 s"):
            await remote.write(transfer, 0, b"", 0)


async def test_a_record_is_in_the_log_when_its_end_is_told_and_says_whether_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "requests.log"
    log = RequestLog(path)
    async with reached(log=log) as (_, remote):
        done = await remote.sample(tiny.request("whole", [1, 2, 3], 6))
        written = path.read_bytes()  # what would be left after kill -9
        seen: list[int] = []
        part = await remote.sample(tiny.request("part", [1, 2, 3], 100, seed=1), lambda ids: not seen.extend(ids))  # type: ignore[func-returns-value]
        while (await remote.status()).active:
            continue
        found = await remote.requests_of(["whole", "never", "part"])
        await remote.flush()
        await remote.trim(0)
    log.close()
    (tmp_path / "killed.log").write_bytes(written)
    again = RequestLog(tmp_path / "killed.log")
    entry = again.find("whole")
    again.close()
    assert entry is not None and entry.sampled_ids.tolist() == done.token_ids.tolist()
    assert set(found) == {"whole", "part"} and found["whole"].prompt_ids.tolist() == [1, 2, 3]
    assert (found["whole"].cut, found["whole"].sampled_ids.tolist()) == (False, done.token_ids.tolist())
    assert found["part"].cut and found["part"].sampled_ids[: len(seen)].tolist() == seen == part.token_ids.tolist()


async def test_life_over_http() -> None:
    async with reached() as (engine, remote):
        for path, state in (("pause", "paused"), ("resume", "serving"), ("sleep", "asleep"), ("wake", "serving")):
            await remote._ask("POST", f"/{path}")
            assert engine.state == state
        with pytest.raises(EngineError, match="only one that sleeps can be woken"):
            await remote._ask("POST", "/wake")
        with pytest.raises(EngineError, match="idle_ms"):
            await remote._ask("POST", "/pause", data=b'{"idle_ms": 5}')
