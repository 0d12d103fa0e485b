"""The driver's own record of every request: what was prompted and what was drawn, kept across restarts.

One thread of the log's own writes it; callers wait for the disk only in ``flush`` and ``close``. How a record lies in
the file is said in ``request_file``.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forgejax.errors import EngineError
from forgejax.rollout.driver.request_file import RequestFile
from forgejax.types import TokenIds
from forgejax.types.compact import Tip, Tips

_FLUSH_S = 0.25
_REMEMBERED_IDS = 2**25  # of open sessions, 128 MiB; the gateway holds most of these arrays anyway
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoggedRequest:
    """One request as the driver saw it. ``finish_reason`` is a ``FinishReason`` or ``failed``.

    ``version`` is that of its last token, -1 where none was drawn. Prompts of one session are stored as what they add
    to each other.
    """

    request_id: str
    session_id: str = ""
    purpose: str
    owner: str = ""
    finish_reason: str
    version: int
    prompt_ids: TokenIds
    sampled_ids: TokenIds


@dataclass(frozen=True, kw_only=True)
class InheritedTokens:
    """Tokens of requests that had ended when a log was opened.

    ``sampled`` by all of them, those included whose records have been trimmed or damaged since; of these ``cancelled``
    and ``failed`` by requests that ended so. ``given`` are the tokens of the others, by owner, as far as the records
    reach back.
    """

    sampled: int
    cancelled: int
    failed: int
    given: Mapping[str, int]

    def __add__(self, other: InheritedTokens) -> InheritedTokens:
        """Those of several logs."""
        given = Counter(self.given)
        given.update(other.given)
        return InheritedTokens(
            sampled=self.sampled + other.sampled,
            cancelled=self.cancelled + other.cancelled,
            failed=self.failed + other.failed,
            given=given,
        )


NO_TOKENS = InheritedTokens(sampled=0, cancelled=0, failed=0, given={})


class RequestLog:
    """Appends and looks up requests; any thread may do either.

    ``find`` sees everything appended before it, on disk or not. An id that is used again means its latest request.
    ``inherited`` are the tokens that were drawn before the file was opened.
    """

    def __init__(self, path: Path):
        """Opens or creates the file and indexes it. Raises EngineError if it is something else."""
        self._path = path
        self._lock = threading.Condition()  # of what callers hand in; never held while the disk is at work
        self._failure: OSError | None = None
        self._closing = False
        self._trim_to = -1
        self._pending: list[LoggedRequest] = []
        self._unwritten: dict[str, LoggedRequest] = {}
        self._disk = threading.Lock()  # of the file and of what is known about it
        self._file = RequestFile(path)
        self._sessions = _Sessions()
        self._unreadable: set[str] = set()
        file = self._file
        self.inherited = InheritedTokens(
            sampled=file.total, cancelled=file.cancelled, failed=file.failed, given=dict(file.found)
        )
        self._thread = threading.Thread(target=self._write_on, name="request-log", daemon=True)
        self._thread.start()

    @property
    def damaged(self) -> int:
        """How many records were found damaged: in the index when the file was opened, and one by one in ``find``."""
        with self._disk:
            return self._file.lost + len(self._unreadable)

    def append(self, entry: LoggedRequest) -> None:
        """Records a request; it is written within a fraction of a second. Raises EngineError if writing failed."""
        with self._lock:
            self._check()
            self._pending.append(entry)
            self._unwritten[entry.request_id] = entry

    def find(self, request_id: str) -> LoggedRequest | None:
        """The request of this id, or None: unknown, trimmed, or damaged, itself or a prompt it continues."""
        with self._lock:
            entry = self._unwritten.get(request_id)
        if entry is not None:
            return entry
        with self._disk:
            found = self._file.find(request_id)
            if found is None:
                return None
            place, record = found
            prompt = None if record is None else self._file.read_prompt(place, record)
            if record is None or prompt is None:
                if request_id not in self._unreadable:
                    _logger.warning(
                        "the request log %s: the record of request %s is damaged; its ids cannot be compared any more",
                        self._path,
                        request_id,
                    )
                self._unreadable.add(request_id)
                return None
        return LoggedRequest(
            request_id=request_id,
            purpose=record.note.purpose,
            owner=record.note.owner,
            finish_reason=record.note.finish_reason,
            version=record.note.version,
            prompt_ids=prompt,
            sampled_ids=record.sampled_ids,
        )

    def trim(self, version: int) -> None:
        """Requests that ended under older versions are not asked for any more; their room is given back in time.

        The file is at most as long again as what is kept of it, or a few MiB.
        """
        with self._lock:
            self._trim_to = max(self._trim_to, version)
            self._lock.notify()

    def write(self) -> None:
        """Writes everything appended so far: it outlives this process, if not the machine. Raises EngineError."""
        self._write_pending()
        with self._lock:
            self._check()

    def flush(self) -> None:
        """Writes and syncs everything appended so far. Raises EngineError if the disk refuses."""
        self._write_pending()
        with self._disk:
            self._sync()

    def close(self) -> None:
        """Flushes and closes; idempotent. Raises EngineError if the disk refuses."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify()
        self._thread.join()
        try:
            self._write_pending()
            with self._disk:
                self._sync()
        finally:
            self._file.close()

    def __len__(self) -> int:
        with self._disk, self._lock:
            return len(self._file.places.keys() | self._unwritten.keys())

    def _write_on(self) -> None:
        while True:
            with self._lock:
                if self._closing or self._failure is not None:
                    return
                self._lock.wait(_FLUSH_S)
                trim_to = self._trim_to
            self._write_pending()
            with self._disk:
                self._file.trim(trim_to)

    def _write_pending(self) -> None:
        """Writes what is pending. A failure is kept for the next caller to be told."""
        with self._disk:
            with self._lock:
                if self._failure is not None:
                    return
                entries, self._pending = self._pending, []
            try:
                self._write(entries)
            except OSError as error:
                with self._lock:
                    self._failure = error
                return
            with self._lock:
                for entry in entries:
                    if self._unwritten.get(entry.request_id) is entry:
                        del self._unwritten[entry.request_id]

    def _write(self, entries: Sequence[LoggedRequest]) -> None:
        for entry in entries:
            tip = Tip(key=self._file.end, prompt_ids=entry.prompt_ids, sampled_ids=entry.sampled_ids)
            parent, shared = self._sessions.add(entry.session_id, tip)
            if parent is None or parent < self._file.start:  # never there, or trimmed
                parent, shared = self._file.end, 0
            self._file.add(
                request_id=entry.request_id,
                purpose=entry.purpose,
                owner=entry.owner,
                finish_reason=entry.finish_reason,
                version=entry.version,
                parent=parent,
                shared=shared,
                ids=np.concatenate([entry.prompt_ids[shared:], entry.sampled_ids], dtype=np.int32, casting="same_kind"),
                sampled=len(entry.sampled_ids),
            )
        self._file.write()

    def _sync(self) -> None:
        try:
            if self._failure is None:
                self._file.sync()
        except OSError as error:
            self._failure = error
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(
                f"the request log {self._path} cannot be written ({self._failure}); nothing accepted before is lost: "
                "free space on its disk, then resume the run"
            )


class _Sessions:
    """The newest sequences of the sessions that were heard of last."""

    def __init__(self) -> None:
        self._tips: OrderedDict[str, Tips[int]] = OrderedDict()
        self._ids = 0

    def add(self, session_id: str, tip: Tip[int]) -> tuple[int | None, int]:
        """See ``Tips.add``. A request without a session continues nothing."""
        if not session_id:
            return None, 0
        tips = self._tips.setdefault(session_id, Tips())
        self._tips.move_to_end(session_id)
        self._ids -= tips.ids
        found = tips.add(tip)
        self._ids += tips.ids
        while self._ids > _REMEMBERED_IDS:
            _, forgotten = self._tips.popitem(last=False)
            self._ids -= forgotten.ids
        return found
