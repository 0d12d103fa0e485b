"""Where a completion is to end, because its text completes one of some strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopWatch:
    """Follows one completion, token by token. Belongs to one thread at a time.

    ``vocabulary[t]`` are the bytes of token t. Strings are looked for as UTF-8, so that a token that holds part of a
    character is no obstacle.
    """

    def __init__(self, vocabulary: Sequence[bytes], stops: Iterable[str]):
        self._vocabulary = vocabulary
        self._stops = tuple(stop.encode("utf-8", "surrogatepass") for stop in stops)
        self._kept = max(map(len, self._stops), default=1) - 1  # bytes that a string may yet begin in
        self._text = b""

    def find_end(self, ids: Iterable[int]) -> int | None:
        """Takes the next ids; how many of them there are up to the one that completes a string, None where none
        does."""
        for count, id_ in enumerate(ids, 1):
            if id_ < len(self._vocabulary):
                self._text += self._vocabulary[id_]
            if any(stop in self._text for stop in self._stops):
                return count
            self._text = self._text[max(len(self._text) - self._kept, 0) :]
        return None
