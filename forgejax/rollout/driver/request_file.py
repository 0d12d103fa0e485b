"""The file of a request log: frames that are appended, found again after damage, and cut off at the front.

After a line of magic come frames: a mark to find the next one by, the sizes of note and body, CRC-32 of both sizes and
the note (little-endian uint32 each), the note in MessagePack, the body. The note says all but the ids; the body holds
those that the request adds to the sequence of an earlier one, ``distance`` bytes back, of which ``shared`` ids hold:
the rest of its prompt, then what was drawn. A frame torn by a crash is cut off when the file is opened; a damaged one
is passed over, and costs itself and the prompts that continue it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
import zlib
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from forgejax.errors import EngineError
from forgejax.types import FinishReason, TokenIds
from forgejax.types.compact import pack_ids, unpack_ids

_MAGIC = b"forgejax-requests-3\n"
_MARK = b"\xf7Rq\x03"
_HEAD = struct.Struct("<4sIII")
CANCELLED, FAILED = FinishReason.CANCELLED.value, "failed"
_LEAST_CUT = 2**20
_CHUNK = 2**22
_CACHED_IDS = 2**22
_logger = logging.getLogger(__name__)


class Note(msgspec.Struct, array_like=True, frozen=True):
    """What a frame says beside its ids. ``number`` counts the requests since the log was begun, this one not included,
    and ``total`` the tokens they drew, this one's included; of these ``cancelled`` and ``failed`` were drawn for
    requests that ended so."""

    request_id: str
    purpose: str
    owner: str
    finish_reason: str
    version: int
    number: int
    total: int
    cancelled: int
    failed: int
    distance: int
    shared: int
    sampled: int
    checksum: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """A frame that was read whole: ``ids`` are the rest of its prompt and what was drawn."""

    note: Note
    ids: TokenIds

    @property
    def sampled_ids(self) -> TokenIds:
        return self.ids[len(self.ids) - self.note.sampled :]


class RequestFile:
    """An open file and the index of it. For one thread at a time.

    A *place* is where a frame begins; it stays the same when frames before it are cut off. ``start`` is the place of
    the first frame and ``end`` that of the next one to be added. ``places`` has the newest frame of each request on
    the disk. ``lost`` counts the frames that were passed over. ``total``, ``cancelled`` and ``failed`` are those of the
    last frame, ``found`` what was given to each owner by the frames that were there when the file was opened.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises EngineError if it is something else."""
        self._path = path
        self.total = self.cancelled = self.failed = self._number = self.lost = 0
        self.found: Counter[str] = Counter()
        self.start = len(_MAGIC)
        self.places: dict[str, int] = {}
        self._frames: deque[tuple[int, int]] = deque()  # place and version of each
        self._buffer: list[tuple[Note, bytes]] = []
        self._cache = _Cache()
        path.parent.mkdir(parents=True, exist_ok=True)
        _aside(path).unlink(missing_ok=True)
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._base = 0  # places less this are offsets in the file
        try:
            self.end = self._index()
        except BaseException:
            self._file.close()
            raise

    def add(
        self,
        *,
        request_id: str,
        purpose: str,
        owner: str,
        finish_reason: str,
        version: int,
        parent: int,
        shared: int,
        ids: TokenIds,
        sampled: int,
    ) -> None:
        """Adds a frame at ``end``; ``write`` brings it to the disk. ``parent``: a place, ``end`` for none."""
        body = pack_ids(ids)
        self.total += sampled
        self.cancelled += sampled if finish_reason == CANCELLED else 0
        self.failed += sampled if finish_reason == FAILED else 0
        note = Note(
            request_id=request_id,
            purpose=purpose,
            owner=owner,
            finish_reason=finish_reason,
            version=version,
            number=self._number,
            total=self.total,
            cancelled=self.cancelled,
            failed=self.failed,
            distance=self.end - parent,
            shared=shared,
            sampled=sampled,
            checksum=zlib.crc32(body),
        )
        self._number += 1
        frame = _frame(note, body)
        self._buffer.append((note, frame))
        self.end += len(frame)

    def write(self) -> None:
        """Writes what was added. After an OSError nothing more may be written."""
        if not self._buffer:
            return
        place = self.end - sum(len(frame) for _, frame in self._buffer)
        self._file.seek(place - self._base)
        unwritten = memoryview(b"".join(frame for _, frame in self._buffer))
        while unwritten:
            unwritten = unwritten[self._file.write(unwritten) or 0 :]
        for note, frame in self._buffer:
            self._enter(note, place)
            place += len(frame)
        self._buffer.clear()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def find(self, request_id: str) -> tuple[int, Record | None] | None:
        """The place of a request's frame and what it holds, which is None where it is damaged."""
        place = self.places.get(request_id)
        return None if place is None else (place, self._read(place))

    def read_prompt(self, place: int, record: Record) -> TokenIds | None:
        """The whole prompt of the record at ``place``; None where one that it continues is damaged."""
        note, rest = record.note, record.ids[: len(record.ids) - record.note.sampled]
        prompt = np.empty(note.shared + len(rest), np.int32)
        prompt[note.shared :] = rest
        needed = note.shared
        while needed:
            place -= note.distance
            parent = self._read(place)
            if parent is None or parent.note.shared + len(parent.ids) < needed:
                return None
            note = parent.note
            if needed > note.shared:
                prompt[note.shared : needed] = parent.ids[: needed - note.shared]
                needed = note.shared
        return prompt

    def trim(self, version: int) -> None:
        """Cuts off the frames before the first of ``version`` or later, where that halves the file.

        What is kept is written aside and takes the file's place; where the disk refuses, the file stays as it is.
        """
        while len(self._frames) > 1 and self._frames[0][1] < version:  # the last frame holds the totals
            self._frames.popleft()
        cut = self._frames[0][0] if self._frames else self.start
        if cut - self.start < max(_LEAST_CUT, self.end - cut):
            self._frames.appendleft((self.start, -1))
            return
        try:
            self._replace(cut)
        except OSError as error:
            _logger.warning("the request log %s could not be trimmed (%s); it goes on growing", self._path, error)
            _aside(self._path).unlink(missing_ok=True)
            self._frames.appendleft((self.start, -1))
            return
        self._base += cut - self.start
        self.start = cut
        self.places = {name: place for name, place in self.places.items() if place >= cut}

    def _replace(self, cut: int) -> None:
        with contextlib.ExitStack() as on_error:
            kept = on_error.enter_context(_aside(self._path).open("x+b", buffering=0))
            kept.write(_MAGIC)
            offset = cut - self._base
            while chunk := os.pread(self._file.fileno(), _CHUNK, offset):
                left = memoryview(chunk)
                while left:
                    left = left[kept.write(left) or 0 :]
                offset += len(chunk)
            os.fsync(kept.fileno())
            _aside(self._path).replace(self._path)
            on_error.pop_all()
        self._file.close()
        self._file = kept
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _enter(self, note: Note, place: int) -> None:
        self.places[note.request_id] = place
        self._frames.append((place, note.version))

    def _read(self, place: int) -> Record | None:
        """The record at a place, or None where there is none, or a damaged one."""
        record = self._cache.get(place)
        if record is not None or place < self.start:
            return record
        offset = place - self._base
        head = os.pread(self._file.fileno(), _HEAD.size, offset)
        if len(head) < _HEAD.size:
            return None
        _, note_size, body_size, _ = _HEAD.unpack(head)
        if offset + _HEAD.size + note_size + body_size > os.fstat(self._file.fileno()).st_size:
            return None
        rest = os.pread(self._file.fileno(), note_size + body_size, offset + _HEAD.size)
        note, body = _read_note(head + rest, 0), rest[note_size:]
        if note is None or zlib.crc32(body) != note.checksum:
            return None
        record = Record(note=note, ids=unpack_ids(body))
        self._cache.put(place, record)
        return record

    def _index(self) -> int:
        """Reads all notes, mends the ends of the file, and gives the place behind the last frame."""
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            return self._write_magic()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            whole = view[: len(_MAGIC)] == _MAGIC
            end = self._walk(view, len(_MAGIC))
            begun = _MAGIC.startswith(view[: len(_MAGIC)])
        if not whole:
            if not self.places and not begun:
                raise EngineError(
                    f"{self._path} is not a request log of this version; name another file or move this one away"
                )
            self._write_magic()
        if self.lost:
            _logger.warning("the request log %s is damaged: %d records are lost", self._path, self.lost)
        if size > end:
            _logger.warning("the request log %s ended in %d torn bytes; they are cut off", self._path, size - end)
            self._file.truncate(end)
        return end

    def _walk(self, view: mmap.mmap, end: int) -> int:
        """Enters every sound note from ``end`` on; gives the offset behind the last of them."""
        offset = end
        while 0 <= offset < len(view):
            note = _read_note(view, offset)
            if note is None:
                offset = view.find(_MARK, offset + 1)
                continue
            missing = note.number - self._number if self.places else int(offset > end)
            self.lost += max(0, missing)
            self.total, self.cancelled, self.failed = note.total, note.cancelled, note.failed
            self._number = note.number + 1
            if note.finish_reason not in (CANCELLED, FAILED):
                self.found[note.owner] += note.sampled
            self._enter(note, offset)
            _, note_size, body_size, _ = _HEAD.unpack_from(view, offset)
            end = offset = offset + _HEAD.size + note_size + body_size
        return end

    def _write_magic(self) -> int:
        self._file.seek(0)
        self._file.write(_MAGIC)
        return len(_MAGIC)


class _Cache:
    """The records read last, for a prompt is put together from those it continues."""

    def __init__(self) -> None:
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._ids = 0

    def get(self, place: int) -> Record | None:
        record = self._records.get(place)
        if record is not None:
            self._records.move_to_end(place)
        return record

    def put(self, place: int, record: Record) -> None:
        self._records[place] = record
        self._ids += len(record.ids)
        while self._ids > _CACHED_IDS and len(self._records) > 1:
            self._ids -= len(self._records.popitem(last=False)[1].ids)


def _frame(note: Note, body: bytes) -> bytes:
    written = _NOTES.encode(note)
    return _HEAD.pack(_MARK, len(written), len(body), _checksum(len(written), len(body), written)) + written + body


def _read_note(data: bytes | mmap.mmap, offset: int) -> Note | None:
    """The note of the frame at an offset; None where there is no sound one with room for its body."""
    if offset + _HEAD.size > len(data):
        return None
    mark, note_size, body_size, checksum = _HEAD.unpack_from(data, offset)
    start = offset + _HEAD.size
    if mark != _MARK or start + note_size + body_size > len(data):
        return None
    written = data[start : start + note_size]
    if _checksum(note_size, body_size, written) != checksum:
        return None
    return _NOTE_DECODER.decode(written)


def _checksum(note_size: int, body_size: int, note: bytes) -> int:
    return zlib.crc32(note, zlib.crc32(struct.pack("<II", note_size, body_size)))


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".new")


_NOTES = msgspec.msgpack.Encoder()
_NOTE_DECODER = msgspec.msgpack.Decoder(Note)
