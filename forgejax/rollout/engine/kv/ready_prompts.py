"""Prompts that are prefilled and ready to be inserted again: the members of a group ask for the same one.

The prefix cache keeps whole pages, so that the tokens behind the last page would be computed once per member, each time
with a pass over all weights.
"""

from __future__ import annotations

from collections import OrderedDict

from forgejax.rollout.engine.kv.base import PrefilledSequence
from forgejax.types import TokenIds


class ReadyPrompts:
    """The most recently used prompts, prefilled. Not thread-safe: it belongs to the driver's thread."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._sequences: OrderedDict[bytes, PrefilledSequence] = OrderedDict()

    def reset(self) -> None:
        """Forgets everything: the weights have changed."""
        self._sequences.clear()

    def find(self, ids: TokenIds) -> PrefilledSequence | None:
        """Exactly this prompt, or None."""
        key = ids.tobytes()
        if key in self._sequences:
            self._sequences.move_to_end(key)
        return self._sequences.get(key)

    def keep(self, ids: TokenIds, sequence: PrefilledSequence) -> None:
        """Keeps a prompt; the least recently used gives way."""
        self._sequences[ids.tobytes()] = sequence
        while len(self._sequences) > self._capacity:
            self._sequences.popitem(last=False)
