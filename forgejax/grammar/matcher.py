"""Where one completion stands in its grammar, as a mask over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from forgejax.errors import GrammarError


class TextMatcher:
    """Follows one completion, token by token. Belongs to one thread at a time.

    ``matcher`` is its own; ``vocabulary_size`` counts the tokens that it knows, of which no stop id is ever text.
    """

    def __init__(self, matcher: LLMatcher, stop_ids: Iterable[int], vocabulary_size: int):
        self._matcher, self._size = matcher, vocabulary_size
        self._stop_ids = frozenset(stop_ids)

    def accept(self, ids: Iterable[int]) -> None:
        """Takes the tokens that were drawn; a stop id ends the text. ``fill`` tells if one of them was not allowed."""
        for id_ in ids:
            if id_ in self._stop_ids:
                return
            self._matcher.consume_token(id_)

    def fill(self, words_W: NDArray[np.uint32]) -> None:
        """Sets bit t % 32 of word t // 32 for every token t that may be drawn next, and clears all others.

        Stop ids may be drawn where the text is complete. Raises GrammarError where nothing may be drawn, or where the
        grammar turned out to be too complex to follow.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {self._matcher.get_error()[:300].strip()}")
        words_W[:] = 0
        words_W[: len(words)] = words[: len(words_W)]
        limit = len(words_W) * 32
        for id_ in (*self._stop_ids, self._size):  # the library's own end of text has the id behind the last token
            if id_ < limit:
                words_W[id_ // 32] &= ~np.uint32(1 << id_ % 32)
        if self._matcher.is_accepting():
            for id_ in self._stop_ids:
                if id_ < limit:
                    words_W[id_ // 32] |= np.uint32(1 << id_ % 32)
        if not words_W.any():
            raise GrammarError("no token of the policy's vocabulary can go on with a text of the grammar")
