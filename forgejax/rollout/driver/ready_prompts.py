"""Prompts that are prefilled and ready to be inserted again: the members of a group ask for the same one.

The prefix cache keeps whole pages, so that the tokens behind the last page would be computed once per member, each time
with a pass over all weights.
"""

from __future__ import annotations

from collections import OrderedDict

from forgejax.rollout.engine.programs import Prefix
from forgejax.types import TokenIds


class ReadyPrompts:
    """The most recently used prompts and their prefixes. Not thread-safe: it belongs to the driver's thread."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()

    def reset(self) -> None:
        """Forgets everything: the weights have changed."""
        self._prefixes.clear()

    def find(self, ids: TokenIds) -> Prefix | None:
        """The prefix of exactly this prompt, or None."""
        key = ids.tobytes()
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
        return self._prefixes.get(key)

    def keep(self, ids: TokenIds, prefix: Prefix) -> None:
        """Keeps a prefix; the least recently used gives way."""
        self._prefixes[ids.tobytes()] = prefix
        while len(self._prefixes) > self._capacity:
            self._prefixes.popitem(last=False)
