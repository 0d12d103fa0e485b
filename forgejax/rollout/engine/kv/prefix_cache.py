"""Which prefixes have their keys and values kept, and in which pages: a radix tree of whole pages, bounded, LRU.

The tree is bookkeeping on the host; ``pages`` moves the data. One tree serves one policy version: a new version starts
an empty one, so that no request reuses what other weights computed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from forgejax.types import TokenIds

_ROOT = 0


@dataclass(frozen=True, kw_only=True)
class Match:
    """A cached prefix: its length in tokens and its pages in order. Valid until the next ``store`` or ``reset``."""

    length: int
    pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Node:
    """One page of tokens below its parent; ``key`` is (id of the parent, the page's token bytes)."""

    id: int
    page: int
    key: tuple[int, bytes]


class PrefixCache:
    """Longest-prefix lookup over token ids. Not thread-safe: it belongs to the driver's thread."""

    def __init__(self, *, page_tokens: int, capacity_pages: int):
        self._page_tokens, self._capacity = page_tokens, capacity_pages
        self._version: int | None = None
        self._next_id = _ROOT + 1
        self._free = list(range(capacity_pages))
        # Ordered by last use. A path is touched from leaf to root, so the oldest node never has children.
        self._nodes: OrderedDict[tuple[int, bytes], _Node] = OrderedDict()

    def reset(self, version: int) -> None:
        """Forgets everything; from now on keys and values of ``version`` are kept."""
        self._version = version
        self._nodes.clear()
        self._free = list(range(self._capacity))

    def match(self, ids: TokenIds, version: int) -> Match:
        """The longest kept prefix of ``ids`` computed by ``version``, in whole pages and shorter than ``ids``.

        At least one token is always left over: the last one is fed by the decode step that draws the next.
        """
        if version != self._version:
            return Match(length=0, pages=())
        path = self._find_path(ids, (len(ids) - 1) // self._page_tokens)
        self._touch(path)
        return Match(length=len(path) * self._page_tokens, pages=tuple(node.page for node in path))

    def store(self, ids: TokenIds, version: int) -> dict[int, int]:
        """Makes room for all whole pages of ``ids``; returns {index of the page in ids: page to fill}, new ones only.

        The caller fills the pages at once. Least recently used prefixes give way; pages that find no room (a sequence
        longer than the cache) are left out, from the end. Another version than the current one stores nothing.
        """
        if version != self._version:
            return {}
        count = len(ids) // self._page_tokens
        path = self._find_path(ids, count)
        self._touch(path)
        fresh: dict[int, int] = {}
        for index in range(len(path), count):
            page = self._allocate(path)
            if page is None:
                break
            node = _Node(id=self._next_id, page=page, key=(path[-1].id if path else _ROOT, self._cut(ids, index)))
            self._next_id += 1
            self._nodes[node.key] = node
            path.append(node)
            fresh[index] = page
        self._touch(path)
        return fresh

    @property
    def pages_used(self) -> int:
        return len(self._nodes)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each page is free or held once and each node's parent is more recent."""
        held = [node.page for node in self._nodes.values()]
        if sorted(held + self._free) != list(range(self._capacity)):
            raise AssertionError("prefix cache: a page is lost or held twice")
        seen: set[int] = {_ROOT}
        for node in reversed(self._nodes.values()):
            if node.key[0] not in seen:
                raise AssertionError("prefix cache: a page outlived or outaged the one before it")
            seen.add(node.id)

    def _find_path(self, ids: TokenIds, most: int) -> list[_Node]:
        path: list[_Node] = []
        for index in range(most):
            node = self._nodes.get((path[-1].id if path else _ROOT, self._cut(ids, index)))
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._nodes.move_to_end(node.key)

    def _allocate(self, path: list[_Node]) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._nodes:
            return None
        oldest = next(iter(self._nodes.values()))
        if path and any(node is oldest for node in path):
            return None
        del self._nodes[oldest.key]
        return oldest.page

    def _cut(self, ids: TokenIds, index: int) -> bytes:
        return ids[index * self._page_tokens : (index + 1) * self._page_tokens].tobytes()
