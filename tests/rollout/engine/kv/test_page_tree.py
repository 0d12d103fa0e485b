"""Laws of what is kept of which prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.rollout.engine.kv.page_tree import Match, PageTree


def _ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _matched(tree: PageTree, *values: int) -> tuple[int, tuple[int, ...], int | None]:
    match = tree.match(_ids(*values))
    return match.length, match.pages, match.partial


def test_a_prefix_is_found_to_the_token_in_whole_pages_and_a_part_of_one() -> None:
    tree = PageTree(page_tokens=2)
    tree.add(_ids(1, 2, 3, 4, 5), [10, 11, 12])
    assert _matched(tree, 1, 2, 3, 4, 5, 6) == (5, (10, 11), 12)
    assert _matched(tree, 1, 2, 3, 9) == (3, (10,), 11)
    assert _matched(tree, 1, 2, 3) == (3, (10,), 11)
    assert _matched(tree, 1, 2) == (2, (10,), None)
    assert _matched(tree, 9, 1, 2) == (0, (), None)
    assert tree.match(_ids()) == Match(length=0, pages=(), partial=None)


def test_a_page_that_its_owner_goes_on_writing_is_kept_as_it_grows() -> None:
    tree = PageTree(page_tokens=4)
    tree.add(_ids(1, 2, 3, 4, 5), [10, 11])
    tree.add(_ids(1, 2, 3, 4, 5, 6, 7, 8, 9), [10, 11, 12])
    assert _matched(tree, 1, 2, 3, 4, 5, 6, 7, 8, 9) == (9, (10, 11), 12) and tree.pages == {10, 11, 12}
    tree.check_integrity()


def test_the_same_tokens_are_kept_once_and_below_another_prefix_they_are_another_page() -> None:
    tree = PageTree(page_tokens=1)
    tree.add(_ids(1, 7), [10, 11])
    tree.add(_ids(1, 7, 8), [20, 21, 22])
    assert _matched(tree, 1, 7, 8) == (3, (10, 11, 22), None) and tree.pages == {10, 11, 22}
    assert _matched(tree, 2, 7) == (0, (), None)


def test_the_closest_of_many_children_is_found() -> None:
    tree = PageTree(page_tokens=3)
    for page, ids in enumerate([(1, 2, 3), (1, 2, 300), (1, 256, 1), (2, 1, 1)]):
        tree.add(_ids(*ids), [page])
    assert _matched(tree, 1, 2, 299) == (2, (), 1) or _matched(tree, 1, 2, 299) == (2, (), 0)
    assert _matched(tree, 1, 256, 2) == (2, (), 2)
    assert _matched(tree, 2, 2) == (1, (), 3)


def test_a_forgotten_leaf_is_found_no_more_and_what_is_out_of_place_is_told() -> None:
    tree = PageTree(page_tokens=1)
    tree.add(_ids(1, 2, 3), [10, 11, 12])
    assert [tree.is_leaf(page) for page in (10, 11, 12)] == [False, False, True]
    tree.remove(12)
    assert _matched(tree, 1, 2, 3) == (2, (10, 11), None) and tree.is_leaf(11) and not tree.has(12)
    tree._nodes[11].ids = b"else"
    with pytest.raises(AssertionError, match="page 11 is not where its tokens say"):
        tree.check_integrity()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_what_is_found_is_the_longest_common_prefix_with_anything_kept(texts: list[list[int]], width: int) -> None:
    tree, pages = PageTree(page_tokens=width), iter(range(1000))
    content: dict[int, list[int]] = {}  # what the device would hold in each page: the whole prefix it stands for
    for at, text in enumerate(texts):
        match = tree.match(_ids(*text))
        most = max((_common(text, other) for other in texts[:at]), default=0)
        assert match.length == most
        whole = [text[: (index + 1) * width] for index in range(most // width)]
        assert [content[page] for page in match.pages] == whole
        assert match.partial is None or content[match.partial][:most] == text[:most]
        own = [*match.pages, *(next(pages) for _ in range(-(-len(text) // width) - len(match.pages)))]
        tree.add(_ids(*text), own)
        for index, page in enumerate(own):
            content.setdefault(page, text[: (index + 1) * width])
        tree.check_integrity()


def _common(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
