"""Which prefixes are kept, and for whom: those of the weights that serve for everybody, those of older weights for the
session that had them computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgejax.rollout.engine.kv.page_tree import Match, PageTree
from forgejax.types import TokenIds


@dataclass(frozen=True, kw_only=True)
class Found:
    """A kept prefix; ``oldest`` is the oldest version in it where that is not the one that serves."""

    match: Match
    oldest: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Own:
    """What one session may find of keys and values whose oldest are of one version."""

    session: str
    oldest: int
    tree: PageTree


class KeptPrefixes:
    """Prefixes by what they hold, in the pages of one pool. Not thread-safe.

    ``max_age``: how many versions older than those that serve a session's own may be; None keeps none of older ones.
    Later tokens see all earlier ones, so that a prefix is as old as its first page.
    """

    def __init__(self, page_tokens: int, max_age: int | None):
        self._page_tokens, self._max_age = page_tokens, max_age
        self._version = 0
        self._common = PageTree(page_tokens)
        self._own: dict[str, dict[int, _Own]] = {}
        self._owners: dict[int, list[_Own]] = {}  # by page

    def serve(self, version: int) -> None:
        """From now on weights of this version compute; nothing that others computed is found but by its session.

        Nor by that where those others were of this version too, and it could not be told which computed what.
        """
        self._version = version
        self._common.clear()
        for own in [own for of in self._own.values() for own in of.values()]:
            if own.oldest >= version or not self._young(own.oldest):
                for page in own.tree.pages:
                    self._disown(page, own)
                self._close(own)

    def match(self, ids: TokenIds, session: str) -> Found:
        """The longest kept prefix of ``ids`` for this session, to the token; of equal ones that of newer weights."""
        best = Found(match=self._common.match(ids))
        for own in sorted(self._own.get(session, {}).values(), key=lambda own: -own.oldest):
            match = own.tree.match(ids)
            if match.length > best.match.length:
                best = Found(match=match, oldest=own.oldest if own.oldest < self._version else None)
        return best

    def add(self, ids: TokenIds, pages: list[int], session: str, oldest: int | None) -> list[int]:
        """Keeps ``ids``, which lie in ``pages``, as far as they are not kept yet.

        ``oldest``: the oldest version in them, None where the weights that serve computed all of it. Gives the pages
        that are no longer kept.
        """
        dropped = self._common.add(ids, pages) if oldest is None else []
        age = self._version if oldest is None else oldest
        if session and self._young(age) and (oldest is None or oldest < self._version):
            of = self._own.setdefault(session, {})
            own = of.get(age)
            if own is None:
                own = of[age] = _Own(session=session, oldest=age, tree=PageTree(self._page_tokens))
            gone = own.tree.add(ids, pages)
            for page in pages:
                if own.tree.has(page) and own not in self._owners.setdefault(page, []):
                    self._owners[page].append(own)
            for page in gone:
                self._disown(page, own)
            dropped += gone
        return [page for page in dict.fromkeys(dropped) if not self.has(page)]

    def remove(self, page: int) -> None:
        """Forgets a leaf."""
        if self._common.has(page):
            self._common.remove(page)
        for own in self._owners.get(page, [])[:]:
            own.tree.remove(page)
            self._disown(page, own)
            if not own.tree.pages:
                self._close(own)

    def has(self, page: int) -> bool:
        return self._common.has(page) or page in self._owners

    def is_leaf(self, page: int) -> bool:
        """Whether no kept page lies behind this one."""
        trees = [own.tree for own in self._owners.get(page, [])]
        return all(tree.is_leaf(page) for tree in (self._common, *trees) if tree.has(page))

    @property
    def pages(self) -> set[int]:
        """Everything that is kept."""
        return self._common.pages | self._owners.keys()

    def check_integrity(self) -> None:
        """Raises AssertionError unless every tree is one, and each page's owners are the trees that hold it."""
        self._common.check_integrity()
        held: dict[int, set[_Own]] = {}
        for session, of in self._own.items():
            for own in of.values():
                own.tree.check_integrity()
                if own.session != session or not own.tree.pages or not self._young(own.oldest):
                    raise AssertionError(f"kept prefixes: session {session} keeps nothing, or what is too old")
                for page in own.tree.pages:
                    held.setdefault(page, set()).add(own)
        if held != {page: set(owners) for page, owners in self._owners.items()}:
            raise AssertionError("kept prefixes: a page is not with those who keep it")

    def _young(self, oldest: int) -> bool:
        return self._max_age is not None and oldest >= self._version - self._max_age

    def _disown(self, page: int, own: _Own) -> None:
        owners = self._owners[page]
        owners.remove(own)
        if not owners:
            del self._owners[page]

    def _close(self, own: _Own) -> None:
        del self._own[own.session][own.oldest]
        if not self._own[own.session]:
            del self._own[own.session]
