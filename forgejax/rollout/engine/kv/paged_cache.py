"""The pages of one pool: which sequences hold them, which are kept for later ones, which are free.

Sequences share pages that are full and write only into pages of their own: where a prefix ends within a page, that page
is copied. What nobody holds stays until its room is needed, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgejax.ops.paged.batch import NOBODY
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.kv.kept_prefixes import Found, KeptPrefixes
from forgejax.rollout.engine.kv.page_tree import Match
from forgejax.types import TokenIds

_NOTHING = Found(match=Match(length=0, pages=(), partial=None))


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a sequence begins with: how many of its tokens are there, once page ``copy[0]`` is copied to ``copy[1]``.

    ``oldest`` is the oldest version in them, None where the weights that serve computed them all.
    """

    cached_tokens: int
    copy: tuple[int, int] | None
    oldest: int | None = None


@dataclass(eq=False, kw_only=True)
class _Sequence:
    tokens: int  # there is room for
    pages: list[int]


class PagedCache:
    """The account of one pool. Sequences go by a number of the caller's, a slot or another. Not thread-safe.

    A sequence's life is ``begin`` or ``fork``, any number of ``grow`` and ``share``, ``release``. The device follows in
    the order of the calls: a page that is freed may be given to another sequence at once.
    """

    def __init__(self, config: EngineConfig):
        self._page_tokens, self._total = config.page_tokens, config.pool_pages
        self._width, self._reuse = config.context_pages, config.reuses
        self._kept = KeptPrefixes(config.page_tokens, config.max_kv_age if config.reuse == "session" else None)
        self._sequences: dict[int, _Sequence] = {}
        self._holders: NDArray[np.int32] = np.zeros(self._total, np.int32)
        self._free = list(range(self._total - 1, NOBODY, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept and held by nobody, the least recently used first

    def serve(self, version: int) -> None:
        """Nothing of what is there is shared from now on, but with its own session. Sequences keep their pages."""
        self._kept.serve(version)
        for page in [page for page in self._idle if not self._kept.has(page)]:
            del self._idle[page]
            self._free.append(page)

    def begin(self, key: int, ids: TokenIds, spare: int = 0, session: str = "") -> Begun | None:
        """Makes room for a sequence of ``ids``, in what is kept of it for this session, but for its last token.

        None, and nothing has changed, unless as many pages as it takes and ``spare`` more are to be had. Raises
        ValueError for a key in use and for more tokens than the context holds.
        """
        self._require_new(key, len(ids))
        found = self._kept.match(ids[:-1], session) if self._reuse else _NOTHING
        match = found.match
        self._hold(match.pages)
        source = match.partial
        needed = self._count_pages(len(ids)) - len(match.pages)
        fresh = self._take_beside(source, needed, spare)
        if fresh is None and source is not None and self._holders[source] == 0:
            source, fresh = None, self._take(needed, spare)  # the page to be copied was itself the room
        if fresh is None:
            self._drop(match.pages)
            return None
        self._sequences[key] = _Sequence(tokens=len(ids), pages=[*match.pages, *fresh])
        if source is None:
            whole = len(match.pages) * self._page_tokens
            return Begun(cached_tokens=whole, copy=None, oldest=found.oldest if whole else None)
        return Begun(cached_tokens=match.length, copy=(source, fresh[0]), oldest=found.oldest)

    def fork(self, source: int, key: int, tokens: int, room: int) -> Begun | None:
        """Begins a sequence with the first ``tokens`` of another and ``room`` in all; None without enough pages."""
        self._require_new(key, room)
        whole, rest = divmod(tokens, self._page_tokens)
        pages = self._sequences[source].pages
        fresh = self._take(self._count_pages(room) - whole, 0)
        if fresh is None:
            return None
        self._hold(pages[:whole])
        self._sequences[key] = _Sequence(tokens=room, pages=[*pages[:whole], *fresh])
        return Begun(cached_tokens=tokens, copy=(pages[whole], fresh[0]) if rest else None)

    def grow(self, key: int, tokens: int) -> bool:
        """Makes room for so many tokens in all; False, and nothing has changed, without enough pages."""
        sequence = self._sequences[key]
        if tokens > sequence.tokens:
            fresh = self._take(self._count_pages(tokens) - len(sequence.pages), 0)
            if fresh is None:
                return False
            sequence.pages += fresh
            sequence.tokens = tokens
        return True

    def share(self, key: int, ids: TokenIds, session: str = "", oldest: int | None = None) -> None:
        """Keeps the sequence's first tokens, ``ids``, for later ones: what it holds of them is never written again.

        ``oldest``: the oldest version that had a part in them, for their own session alone to find; None where the
        weights that serve computed them all.
        """
        if self._reuse:
            for page in self._kept.add(ids, self._sequences[key].pages, session, oldest):
                if page in self._idle:
                    del self._idle[page]
                    self._free.append(page)

    def release(self, key: int) -> None:
        """Ends a sequence. Raises ValueError for one that has not begun."""
        if key not in self._sequences:
            raise ValueError(f"sequence {key} has not begun")
        self._drop(self._sequences.pop(key).pages)

    def fill_row(self, key: int, row_M: NDArray[np.int32]) -> None:
        """Writes the pages of a sequence into its row of a page table."""
        pages = self._sequences[key].pages
        row_M[: len(pages)] = pages
        row_M[len(pages) :] = NOBODY

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self._total - 1 - len(self._free) - len(self._idle)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and that are kept for later sequences."""
        return len(self._idle)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each page is free, kept or held, once, and each sequence fits its pages."""
        self._kept.check_integrity()
        held = np.zeros(self._total, np.int32)
        for key, sequence in self._sequences.items():
            if len(sequence.pages) != self._count_pages(sequence.tokens) or len(sequence.pages) > self._width:
                raise AssertionError(f"KV pages: {sequence.tokens} tokens of sequence {key} in {sequence.pages}")
            if len(set(sequence.pages)) != len(sequence.pages):
                raise AssertionError(f"KV pages: sequence {key} holds a page twice: {sequence.pages}")
            held[sequence.pages] += 1
        if (held != self._holders).any():
            raise AssertionError(f"KV pages: pages {np.flatnonzero(held != self._holders)} are miscounted")
        kept = self._kept.pages
        if {page for page in kept if not held[page]} != set(self._idle):
            raise AssertionError("KV pages: what is kept and held by nobody is not what may be taken back")
        used = set(np.flatnonzero(held).tolist()) | kept
        if sorted([*self._free, *used]) != list(range(NOBODY + 1, self._total)):
            raise AssertionError("KV pages: a page is lost, or free and in use")

    def _require_new(self, key: int, tokens: int) -> None:
        if key in self._sequences:
            raise ValueError(f"sequence {key} has begun already; release it first")
        if self._count_pages(tokens) > self._width:
            raise ValueError(f"sequence {key}: {tokens} tokens were asked for; the context holds less")

    def _count_pages(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _take_beside(self, source: int | None, count: int, spare: int) -> list[int] | None:
        """``_take`` without giving up ``source``, which is about to be copied and counts as used now."""
        if source is None:
            return self._take(count, spare)
        self._hold((source,))
        fresh = self._take(count, spare)
        self._drop((source,))
        return fresh

    def _take(self, count: int, spare: int) -> list[int] | None:
        """So many pages for a sequence that holds them from now on, or None."""
        if count + spare > len(self._free) + len(self._idle):
            return None
        while len(self._free) < count:
            page = next((page for page in self._idle if self._kept.is_leaf(page)), None)
            if page is None:
                return None
            self._kept.remove(page)
            del self._idle[page]
            self._free.append(page)
        fresh = [self._free.pop() for _ in range(count)]
        self._hold(fresh)
        return fresh

    def _hold(self, pages: tuple[int, ...] | list[int]) -> None:
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def _drop(self, pages: tuple[int, ...] | list[int]) -> None:
        """From the last page to the first: of what nobody holds any more, leaves are taken back before their roots."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._kept.has(page):
                self._idle[page] = None
            else:
                self._free.append(page)
