"""A cache of encoded pieces of text, bounded by the memory it takes."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_ENTRY_BYTES = 200  # of the dict's slot and the objects' headers, roughly


class PieceCache:
    """Least recently used first out, at ``max_bytes`` of texts and ids together. Thread-safe.

    A piece that takes more than an eighth of that is not kept: it would throw out too much else.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def get(self, piece: str) -> Sequence[int] | None:
        with self._lock:
            ids = self._ids.get(piece)
            if ids is not None:
                self._ids.move_to_end(piece)
            return ids

    def put(self, piece: str, ids: Sequence[int]) -> None:
        kept = array("i", ids)
        size = _size(piece, kept)
        if size > self._max_bytes // 8:
            return
        with self._lock:
            if piece in self._ids:
                return
            self._ids[piece] = kept
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= _size(*self._ids.popitem(last=False))


def _size(piece: str, ids: array[int]) -> int:
    return _ENTRY_BYTES + len(piece) * (1 if piece.isascii() else 4) + len(ids) * ids.itemsize
