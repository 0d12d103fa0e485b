"""Laws of the prefix cache's bookkeeping."""

from __future__ import annotations

import numpy as np

from forgejax.rollout.engine.kv.prefix_cache import PrefixCache


def _ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_stored_prefix_is_found_in_whole_pages_and_never_whole() -> None:
    cache = PrefixCache(page_tokens=2, capacity_pages=8)
    cache.reset(3)
    assert sorted(cache.store(_ids(1, 2, 3, 4, 5), 3)) == [0, 1]
    assert cache.match(_ids(1, 2, 3, 4, 9), 3).length == 4
    assert cache.match(_ids(1, 2, 3, 4), 3).length == 2  # one token must be left to feed
    assert cache.match(_ids(1, 2, 9, 9, 9), 3).length == 2
    assert cache.match(_ids(9, 1, 2), 3).length == 0


def test_shared_pages_are_stored_once() -> None:
    cache = PrefixCache(page_tokens=2, capacity_pages=8)
    cache.reset(0)
    first = cache.store(_ids(1, 2, 3, 4), 0)
    second = cache.store(_ids(1, 2, 5, 6), 0)
    assert sorted(second) == [1] and second[1] not in first.values()
    assert cache.store(_ids(1, 2, 5, 6), 0) == {} and cache.pages_used == 3


def test_the_same_tokens_below_another_prefix_are_another_page() -> None:
    cache = PrefixCache(page_tokens=1, capacity_pages=8)
    cache.reset(0)
    cache.store(_ids(1, 7), 0)
    assert cache.match(_ids(2, 7, 0), 0).length == 0
    assert sorted(cache.store(_ids(2, 7), 0)) == [0, 1]


def test_another_version_neither_finds_nor_stores() -> None:
    cache = PrefixCache(page_tokens=1, capacity_pages=8)
    cache.reset(0)
    cache.store(_ids(1, 2), 0)
    assert cache.match(_ids(1, 2, 3), 1).length == 0 and cache.store(_ids(1, 2), 1) == {}
    cache.reset(1)
    assert cache.match(_ids(1, 2, 3), 1).length == 0 and cache.pages_used == 0


def test_the_least_recently_used_leaf_gives_way_and_a_shared_root_stays() -> None:
    cache = PrefixCache(page_tokens=1, capacity_pages=3)
    cache.reset(0)
    cache.store(_ids(1, 2), 0)
    cache.store(_ids(1, 3), 0)
    cache.match(_ids(1, 2, 0), 0)
    cache.store(_ids(1, 4), 0)
    assert [cache.match(_ids(1, last, 0), 0).length for last in (2, 3, 4)] == [2, 1, 2]


def test_a_sequence_longer_than_the_cache_keeps_its_beginning() -> None:
    cache = PrefixCache(page_tokens=1, capacity_pages=3)
    cache.reset(0)
    assert sorted(cache.store(_ids(1, 2, 3, 4, 5), 0)) == [0, 1, 2]
    assert cache.match(_ids(1, 2, 3, 4, 5), 0).length == 3
    assert PrefixCache(page_tokens=1, capacity_pages=0).match(_ids(1, 2), 0).length == 0


def test_the_tree_stays_whole_and_agrees_with_a_plain_model_of_it() -> None:
    rng = np.random.default_rng(0)
    cache = PrefixCache(page_tokens=2, capacity_pages=16)
    cache.reset(0)
    content: dict[int, bytes] = {}  # what the device would hold in each page: the whole prefix it stands for
    for _ in range(600):
        ids = rng.integers(0, 3, rng.integers(1, 14)).astype(np.int32)
        if rng.random() < 0.5:
            for index, page in cache.store(ids, 0).items():
                content[page] = ids[: 2 * index + 2].tobytes()
        match = cache.match(ids, 0)
        assert match.length < len(ids)
        for index, page in enumerate(match.pages):
            assert content[page] == ids[: 2 * index + 2].tobytes()
        cache.check_integrity()
        if rng.random() < 0.01:
            cache.reset(0)
