"""Text to a terminal, pipe or file that may be slow, stalled or gone, without ever holding up who writes."""

import contextlib
import os
import select
import threading
from collections import deque
from typing import TextIO

_RETRY_S = 0.2


class Outlet:
    """A text stream in front of ``stream``: ``write`` only queues, a daemon thread does the writing.

    A reader that stalls (a pager, a paused terminal) costs the oldest queued texts beyond ``capacity``. A reader that
    goes away (a closed pipe) ends the output silently: the descriptor is pointed at the null device, so that other
    writers of the same stream, and the interpreter's own flush at exit, do not fail either. Threads may share it.
    """

    def __init__(self, stream: TextIO, *, capacity: int = 512) -> None:
        self._stream = stream
        self._capacity = capacity
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._descriptor = _descriptor(stream)
        self._changed = threading.Condition()
        self._queued: deque[str] = deque()
        self._ended = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="progress-output", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queues ``text``; after the end it is forgotten."""
        with self._changed:
            if not self._ended:
                if len(self._queued) >= self._capacity:
                    self._queued.popleft()
                    self.dropped += 1
                self._queued.append(text)
                self._changed.notify()
        return len(text)

    def flush(self) -> None:
        """Does nothing: the thread flushes."""

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self, *, deadline_s: float = 2.0) -> None:
        """Takes no more text and waits until the queued text is out, ``deadline_s`` at most. Idempotent."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(deadline_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queued or self._ended)
                if not self._queued:
                    return
                text = "".join(self._queued)
                self._queued.clear()
            try:
                self._put(text)
            except (OSError, ValueError):  # the reader is gone, or the stream was closed under us
                self._abandon()
                return

    def _put(self, text: str) -> None:
        data = text.encode(self.encoding, "replace")
        if self._descriptor is None:
            self._stream.write(data.decode(self.encoding))
            self._stream.flush()
            return
        # Straight to the descriptor: a thread stuck inside sys.stdout would hold its lock, and the interpreter aborts
        # at exit when it cannot have that.
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # A child that shares the terminal may have made it non-blocking.
                select.select([], [self._descriptor], [], _RETRY_S)

    def _abandon(self) -> None:
        with self._changed:
            self._ended = True
            self._queued.clear()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._descriptor)
                os.close(null)


def _descriptor(stream: TextIO) -> int | None:
    """The file descriptor behind ``stream`` once its own buffer is out, or None for a stream in memory."""
    try:
        stream.flush()
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
