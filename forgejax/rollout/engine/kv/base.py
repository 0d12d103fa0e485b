"""The contract of keys and values: what the device programs, the engine and the driver know of how they are kept.

On the device, a ``KVMemory`` is what the programs read and write. On the host, a ``KVCache`` says which slot has room,
what of a prompt need not be computed again and what is kept for later. Another layout implements both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import jax

from forgejax.models import Attend
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import TokenIds


class KVMemory(Protocol):
    """Keys and values of B sequences: a pytree of arrays, whose methods are traced inside the device programs."""

    def attend(self, positions_BQ: jax.Array, length: jax.Array) -> Attend:
        """Attention of Q queries of each of the first B sequences; its memory is a value of this type.

        Each query's key and value are written at its position, then it sees its sequence up to and with itself. What
        stands at a position beyond the memory is not written.

        Args:
            positions_BQ: where each query stands in its sequence.
            length: scalar; keys from it on are not read. It must exceed every position whose output is used.
        """
        ...

    def insert(self, one: Self, index: jax.Array) -> Self:
        """The same memory with its sequence ``index`` replaced by ``one``, a memory of a single sequence."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class PrefilledSequence:
    """A sequence that waits to be decoded: ``length`` tokens in ``kv``, and the ``last`` token, not yet fed."""

    kv: KVMemory  # of one sequence
    length: jax.Array
    last: jax.Array


class Prefiller(Protocol):
    """What a cache computes with; the engine is one. The sequences it is given stay valid."""

    def begin_sequence(self, token: int) -> PrefilledSequence:
        """The sequence of one token: nothing computed, the token waits to be fed."""
        ...

    def resume_sequence(self, kv: KVMemory, length: int, token: int) -> PrefilledSequence:
        """The sequence whose first ``length`` tokens are in ``kv`` and whose next one waits to be fed."""
        ...

    def append(self, params: PublishedWeights, prefix: PrefilledSequence, ids: TokenIds) -> PrefilledSequence:
        """The sequence continued by any number of tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExtendedPrompt:
    """A prompt ready to be inserted in a slot, and how many of its tokens were not computed for it."""

    sequence: PrefilledSequence
    cached_tokens: int


class KVCache(Protocol):
    """The keys and values of one engine: of the requests in its slots, and what is kept to be shared with later ones.

    A slot's life is ``reserve``, ``extend``, any number of decode steps, perhaps ``share``, ``release``. Not
    thread-safe: it belongs to the driver's thread, and ``use`` comes first.
    """

    def use(self, weights: PublishedWeights) -> None:
        """From now on these weights compute; nothing that others computed is shared. Reserved slots stay reserved."""
        ...

    def reserve(self, slot: int, ids: TokenIds, budget: int) -> bool:
        """Sets room aside for a prompt and ``budget`` tokens after it, so that no decode step can run out of it.

        False, and nothing is set aside, if there is no room before another slot is released. If no slot is reserved
        there is room for any request within the engine's context. Raises ValueError for a slot that is reserved already
        and for more tokens than the context holds.
        """
        ...

    def extend(self, slot: int, ids: TokenIds) -> ExtendedPrompt:
        """Computes what is not there yet of the prompt that the slot is reserved for, and shares it at once."""
        ...

    def share(self, memory: KVMemory, slot: int, ids: TokenIds) -> None:
        """Keeps the slot's keys and values of ``ids`` for later requests, as far as there is room.

        ``memory`` is that of all slots. Only for what the weights in use computed alone.
        """
        ...

    def release(self, slot: int) -> None:
        """Gives the slot's room back. Raises ValueError for a slot that is not reserved."""
        ...

    def check_integrity(self) -> None:
        """Raises AssertionError if room is lost, promised twice or larger than it can be. Waits for no device."""
        ...
