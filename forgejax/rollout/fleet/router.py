"""Which engine a request goes to: its session's, else the one with the most of its prompt and the least to do."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forgejax.types import SampleRequest, TokenIds

_BLOCK = 16  # tokens
_REMEMBERED_BLOCKS = 2**17  # of an engine
_REMEMBERED_SESSIONS = 2**16


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """What an engine has to do: its decode slots, requests that decode or wait there, and the tokens these hold."""

    number: int
    slots: int
    requests: int
    tokens: int


class Router:
    """Remembers where sessions and prompts went. For one thread.

    A request's cost somewhere is counted in tokens: those of its prompt that are not cached there, those that each
    decode step has to read for the others, shared by the slots, and for each request that waits before it as much as
    one that is open holds.
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, int] = OrderedDict()
        self._prompts: dict[int, OrderedDict[bytes, None]] = {}
        self.requests = self.kept = self.prompt_tokens = self.expected_tokens = 0

    def choose(self, request: SampleRequest, loads: Sequence[EngineLoad]) -> int:
        """The number of one of the engines, of which there is one at least; it is remembered as the session's.

        ``requests`` and ``kept`` count requests, and those that stayed with their session's engine; ``expected_tokens``
        those of ``prompt_tokens`` that should be cached where they went.
        """
        home = self._sessions.get(request.session_id) if request.session_id else None
        digests = list(_digest(request.prompt_ids))
        found = {load.number: self._match(load.number, digests) for load in loads}
        self.requests += 1
        if home in found:
            self.kept += 1
            number = home
        else:
            number = min(
                loads,
                key=lambda load: (
                    _weigh(load, len(request.prompt_ids) - found[load.number]),
                    load.requests,
                    load.number,
                ),
            ).number
        self.prompt_tokens += len(request.prompt_ids)
        self.expected_tokens += found[number]
        self._remember(number, request.session_id, digests)
        return number

    def forget(self, number: int) -> None:
        """The engine's prefix cache is empty: it has new weights, or is another process."""
        self._prompts.pop(number, None)

    def _match(self, number: int, digests: Sequence[bytes]) -> int:
        """How many tokens the engine has seen of a prompt."""
        known: Mapping[bytes, None] = self._prompts.get(number, {})
        return _BLOCK * next((at for at, digest in enumerate(digests) if digest not in known), len(digests))

    def _remember(self, number: int, session: str, digests: Sequence[bytes]) -> None:
        if session:
            self._sessions[session] = number
            self._sessions.move_to_end(session)
            if len(self._sessions) > _REMEMBERED_SESSIONS:
                self._sessions.popitem(last=False)
        known = self._prompts.setdefault(number, OrderedDict())
        for digest in digests:
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > _REMEMBERED_BLOCKS:
            known.popitem(last=False)


def _weigh(load: EngineLoad, new_tokens: int) -> float:
    waiting = max(0, load.requests + 1 - load.slots)
    held = load.tokens / load.requests if load.requests else 0.0
    return new_tokens + load.tokens / load.slots + waiting * held


def _digest(ids: TokenIds) -> Iterator[bytes]:
    """For each whole block, what tells the prompt up to its end from others."""
    state = hashlib.blake2b(digest_size=12)
    data = np.ascontiguousarray(ids, "<i4")
    for start in range(0, len(data) - _BLOCK + 1, _BLOCK):
        state.update(data[start : start + _BLOCK].tobytes())
        yield state.digest()
