"""The driver's own record of every request: what was prompted and what was drawn, kept across restarts.

An append-only file of frames: payload length and CRC-32 (little-endian uint32 each), then the payload, msgpack of
[request_id, purpose, finish_reason, prompt ids, sampled ids], ids as little-endian int32 bytes. Frames are written by a
thread of the log's own; a frame torn by a crash is cut off when the file is opened again.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from forgejax.errors import EngineError
from forgejax.types import TokenIds

_HEADER = struct.Struct("<II")
_MAGIC = b"forgejax-requests-1\n"
_FLUSH_S = 0.25
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoggedRequest:
    """One request as the driver saw it. ``finish_reason`` is a ``FinishReason`` or ``failed``."""

    request_id: str
    purpose: str
    finish_reason: str
    prompt_ids: TokenIds
    sampled_ids: TokenIds


class RequestLog:
    """Appends and looks up requests; any thread may do either.

    ``find`` sees everything appended before it, on disk or not. An id that is used again means its latest request.
    ``inherited_tokens`` is how many tokens were drawn by the requests that the file already held.
    """

    def __init__(self, path: Path):
        """Opens or creates the file and indexes it. Raises EngineError if it is something else."""
        self._path = path
        self._lock = threading.Condition()
        self._failure: OSError | None = None
        self._closing = False
        self._pending: list[bytes] = []
        self._unwritten: dict[str, bytes] = {}
        self._file, self._offsets, self.inherited_tokens = _open_repaired(path)
        self._thread = threading.Thread(target=self._write_on, name="request-log", daemon=True)
        self._thread.start()

    def append(self, entry: LoggedRequest) -> None:
        """Records a request; it is written within a fraction of a second. Raises EngineError if writing failed."""
        payload = msgspec.msgpack.encode(
            [
                entry.request_id,
                entry.purpose,
                entry.finish_reason,
                entry.prompt_ids.astype("<i4").tobytes(),
                entry.sampled_ids.astype("<i4").tobytes(),
            ]
        )
        with self._lock:
            self._check()
            self._pending.append(payload)
            self._unwritten[entry.request_id] = payload

    def find(self, request_id: str) -> LoggedRequest | None:
        """The request of this id, or None."""
        with self._lock:
            payload = self._unwritten.get(request_id)
            if payload is None:
                place = self._offsets.get(request_id)
                if place is None:
                    return None
                payload = os.pread(self._file.fileno(), place[1], place[0])
        return _decode(payload)

    def flush(self) -> None:
        """Writes and syncs everything appended so far. Raises EngineError if the disk refuses."""
        with self._lock:
            self._write_pending()
            self._check()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes; idempotent. Raises EngineError if the disk refuses."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify()
        self._thread.join()
        with self._lock:
            try:
                self._write_pending()
                self._check()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __len__(self) -> int:
        with self._lock:
            return len(self._offsets.keys() | self._unwritten.keys())

    def _write_on(self) -> None:
        with self._lock:
            while not self._closing and self._failure is None:
                self._lock.wait(_FLUSH_S)
                self._write_pending()

    def _write_pending(self) -> None:
        """Writes what is pending; the caller holds the lock. A failure is kept for the next append to raise."""
        if not self._pending or self._failure is not None:
            return
        frames = [_HEADER.pack(len(payload), zlib.crc32(payload)) + payload for payload in self._pending]
        try:
            start = self._file.seek(0, io.SEEK_END)
            unwritten = memoryview(b"".join(frames))
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) or 0 :]
        except OSError as error:
            _logger.exception("the request log %s cannot be written", self._path)
            self._failure = error
            return
        for payload in self._pending:
            request_id = msgspec.msgpack.decode(payload)[0]
            self._offsets[request_id] = (start + _HEADER.size, len(payload))
            start += _HEADER.size + len(payload)
        self._pending.clear()
        self._unwritten.clear()

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(
                f"the request log {self._path} cannot be written ({self._failure}); free the disk and restart"
            )


def _open_repaired(path: Path) -> tuple[io.FileIO, dict[str, tuple[int, int]], int]:
    """The open file, the place of each request in it, and how many tokens its requests drew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    file = io.FileIO(path, "r+b")  # unbuffered: what is written together is joined first
    head = file.read(len(_MAGIC))
    if head != _MAGIC[: len(head)]:
        file.close()
        raise EngineError(f"{path} is not a request log; name another file or move this one away")
    if len(head) < len(_MAGIC):  # new, or torn while it was created
        file.seek(0)
        file.write(_MAGIC)
    offsets: dict[str, tuple[int, int]] = {}
    good, sampled_tokens = len(_MAGIC), 0
    while True:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            break
        size, checksum = _HEADER.unpack(header)
        payload = file.read(size)
        if len(payload) < size or zlib.crc32(payload) != checksum:
            break
        entry = _decode(payload)
        offsets[entry.request_id] = (good + _HEADER.size, size)
        sampled_tokens += len(entry.sampled_ids)
        good += _HEADER.size + size
    lost = file.seek(0, io.SEEK_END) - good
    if lost:
        _logger.warning("the request log %s ended in %d torn bytes; they are cut off", path, lost)
        file.truncate(good)
    return file, offsets, sampled_tokens


def _decode(payload: bytes) -> LoggedRequest:
    request_id, purpose, finish_reason, prompt, sampled = msgspec.msgpack.decode(payload)
    return LoggedRequest(
        request_id=request_id,
        purpose=purpose,
        finish_reason=finish_reason,
        prompt_ids=np.frombuffer(prompt, "<i4"),
        sampled_ids=np.frombuffer(sampled, "<i4"),
    )
