"""Which prefixes have their keys and values kept, and in which pages: a radix tree, a node a page.

A page that is not full yet may be kept as well: its owner goes on writing behind what the node names, and never into
it. The tree serves one set of weights at a time and knows nothing of who holds a page.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

import numpy as np

from forgejax.types import TokenIds

_ID_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Match:
    """A kept prefix of ``length`` tokens: whole pages in order, and the page whose first tokens are the rest of it."""

    length: int
    pages: tuple[int, ...]
    partial: int | None


@dataclass(eq=False, kw_only=True)
class _Node:
    """The tokens of one page below those of its parent; ids are big-endian, so that bytes sort as ids do."""

    page: int
    parent: _Node | None
    ids: bytes
    children: dict[bytes, _Node] = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)  # the children's ids, sorted


class PageTree:
    """Longest-prefix lookup over token ids. Not thread-safe."""

    def __init__(self, page_tokens: int):
        self._page_tokens = page_tokens
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._root = _Node(page=-1, parent=None, ids=b"")
        self._nodes: dict[int, _Node] = {}  # by page

    def match(self, ids: TokenIds) -> Match:
        """The longest kept prefix of ``ids``, to the token."""
        node, pages, partial, length = self._root, list[int](), None, 0
        while length < len(ids):
            child, shared = _closest(node, self._cut(ids, len(pages)))
            length += shared
            if child is None or shared < self._page_tokens:
                partial = None if child is None else child.page
                break
            pages.append(child.page)
            node = child
        return Match(length=length, pages=tuple(pages), partial=partial)

    def add(self, ids: TokenIds, pages: list[int]) -> list[int]:
        """Keeps ``ids``, which lie in ``pages``, as far as they are not kept yet.

        Gives the pages that are no longer kept: what stood in them stands in longer ones now.
        """
        node, dropped = self._root, list[int]()
        for index in range(-(-len(ids) // self._page_tokens)):
            cut = self._cut(ids, index)
            child, shared = _closest(node, cut)
            while child is not None and len(child.ids) == shared * _ID_BYTES < len(cut) and child.page != pages[index]:
                self.remove(child.page)
                dropped.append(child.page)
                child, shared = _closest(node, cut)
            if child is None or shared * _ID_BYTES < len(cut):
                child = self._place(node, pages[index], cut)
                if child is None:
                    break
            node = child
        return dropped

    def _place(self, parent: _Node, page: int, cut: bytes) -> _Node | None:
        """The page as a child of ``parent``, new or longer than it was; None if it is part of another prefix."""
        node = self._nodes.get(page)
        if node is None:
            node = self._nodes[page] = _Node(page=page, parent=parent, ids=cut)
        elif node.parent is parent and cut.startswith(node.ids):
            _detach(node)
            node.ids = cut
        else:
            return None
        parent.children[cut] = node
        insort(parent.order, cut)
        return node

    def remove(self, page: int) -> None:
        """Forgets a leaf."""
        node = self._nodes.pop(page)
        assert not node.children
        _detach(node)

    def has(self, page: int) -> bool:
        return page in self._nodes

    def is_leaf(self, page: int) -> bool:
        return not self._nodes[page].children

    @property
    def pages(self) -> set[int]:
        """Everything that is kept."""
        return set(self._nodes)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each node is its parent's child, only leaves are not full and all are known."""
        seen, todo = set[int](), [self._root]
        while todo:
            node = todo.pop()
            if sorted(node.children) != node.order:
                raise AssertionError(f"page tree: the children of page {node.page} are out of order")
            for ids, child in node.children.items():
                if child.ids != ids or child.parent is not node or self._nodes.get(child.page) is not child:
                    raise AssertionError(f"page tree: page {child.page} is not where its tokens say")
                if child.children and len(ids) != self._page_tokens * _ID_BYTES:
                    raise AssertionError(f"page tree: page {child.page} is not full and has pages behind it")
                seen.add(child.page)
                todo.append(child)
        if seen != set(self._nodes):
            raise AssertionError(f"page tree: pages {sorted(seen ^ set(self._nodes))} are lost")

    def _cut(self, ids: TokenIds, index: int) -> bytes:
        cut = ids[index * self._page_tokens : (index + 1) * self._page_tokens]
        return np.ascontiguousarray(cut, ">i4").tobytes()


def _closest(node: _Node, cut: bytes) -> tuple[_Node | None, int]:
    """The child that shares the most first tokens with ``cut``, and how many; None where none shares any.

    In sorted order it is a neighbour of where ``cut`` belongs.
    """
    at = bisect_left(node.order, cut)
    best, most = None, 0
    for ids in node.order[max(at - 1, 0) : at + 1]:
        shared = _count_shared(ids, cut)
        if shared > most:
            best, most = node.children[ids], shared
    return best, most


def _count_shared(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size // _ID_BYTES
    differs = np.frombuffer(one[:size], ">i4") != np.frombuffer(other[:size], ">i4")
    return int(differs.argmax())


def _detach(node: _Node) -> None:
    assert node.parent is not None
    del node.parent.children[node.ids]
    del node.parent.order[bisect_left(node.parent.order, node.ids)]
