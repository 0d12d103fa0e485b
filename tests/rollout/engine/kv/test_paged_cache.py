"""Laws of who holds which page."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.rollout import EngineConfig
from forgejax.rollout.engine.kv.paged_cache import Begun, PagedCache


def _cache(**fields: Any) -> PagedCache:
    given: dict[str, Any] = {"slots": 4, "max_context": 16, "page_tokens": 4, "kv_pages": 8}
    return PagedCache(EngineConfig(**(given | fields)))


def _ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _row(cache: PagedCache, key: int) -> list[int]:
    row = np.zeros(4, np.int32)
    cache.fill_row(key, row)
    return row.tolist()


def test_members_of_a_group_share_whole_pages_and_copy_the_one_they_write() -> None:
    cache, ids = _cache(), _ids(*range(7))
    assert cache.begin(0, ids) == Begun(cached_tokens=0, copy=None)
    cache.share(0, ids[:-1])
    first = _row(cache, 0)
    begun = cache.begin(1, ids)
    second = _row(cache, 1)
    assert begun == Begun(cached_tokens=6, copy=(first[1], second[1]))
    assert first[0] == second[0] and cache.held == 3
    cache.check_integrity()


def test_the_next_turn_finds_what_the_turn_before_it_left_and_new_weights_find_nothing() -> None:
    cache = _cache()
    for turn, (end, found) in enumerate([(3, 0), (6, 2), (11, 5)]):
        begun = cache.begin(turn, _ids(*range(end)))
        assert begun is not None and begun.cached_tokens == found
        cache.share(turn, _ids(*range(end - 1)))
        cache.release(turn)
    assert (cache.held, cache.kept) == (0, 3)
    assert cache.begin(9, _ids(*range(12))) is not None
    cache.serve(1)
    assert cache.begin(8, _ids(*range(12))) == Begun(cached_tokens=0, copy=None)
    cache.release(9)
    assert (cache.held, cache.kept) == (3, 0)
    cache.check_integrity()


def test_a_session_finds_its_own_of_older_weights_as_long_as_they_are_young_enough_and_nobody_else_does() -> None:
    cache, ids = _cache(reuse="session", max_kv_age=2), _ids(*range(11))
    cache.begin(0, ids, session="a")
    cache.share(0, ids[:-1], "a")
    cache.release(0)
    for version, found, oldest in ((0, 10, None), (1, 10, 0), (2, 10, 0), (3, 0, None)):
        if version:
            cache.serve(version)
        assert cache.begin(1, ids, session="b") == Begun(cached_tokens=10 if version == 0 else 0, copy=mock.ANY)
        cache.release(1)
        begun = cache.begin(1, ids, session="a")
        assert begun is not None and (begun.cached_tokens, begun.oldest) == (found, oldest)
        cache.release(1)
        cache.check_integrity()
    assert (cache.held, cache.kept) == (0, 0)


def test_what_two_versions_computed_is_its_sessions_and_goes_when_the_older_is_too_old() -> None:
    cache, ids = _cache(reuse="session", max_kv_age=1), _ids(*range(11))
    cache.serve(4)
    cache.begin(0, ids)
    cache.serve(5)
    cache.share(0, ids, "a", 4)  # begun under 4, ended under 5
    cache.begin(1, _ids(*range(7)), session="a")
    cache.share(1, _ids(*range(7)), "a", 4)
    cache.release(0)
    cache.release(1)
    begun = cache.begin(2, ids, session="a")
    assert begun is not None and (begun.cached_tokens, begun.oldest) == (10, 4)
    cache.release(2)
    assert cache.begin(2, ids, session="") == Begun(cached_tokens=0, copy=None)
    cache.serve(5)  # other weights of the same version: nobody knows which of them computed what
    found = cache.begin(3, ids, session="a")
    assert found is not None and found.oldest == 4
    cache.serve(6)
    cache.check_integrity()
    assert cache.kept == 0


def test_what_was_used_least_recently_gives_way_leaves_first_and_what_is_held_stays() -> None:
    cache = _cache(kv_pages=5)
    for key, first in ((0, 10), (1, 20)):  # two pages each
        ids = _ids(*range(first, first + 8))
        cache.begin(key, ids)
        cache.share(key, ids)
    cache.release(0)
    assert cache.begin(2, _ids(*range(30, 38)), spare=2) is None and cache.kept == 2
    assert cache.begin(2, _ids(*range(30, 38))) is not None and cache.kept == 1
    found = cache.begin(3, _ids(*range(10, 13)))  # the root of the first is still there; its leaf went
    assert found is None or found.cached_tokens == 0
    assert cache.begin(4, _ids(*range(20, 30))) is None  # its pages are shared, a third is not to be had
    cache.check_integrity()


def test_a_sequence_grows_page_by_page_until_there_are_no_more() -> None:
    cache = _cache(kv_pages=4)
    cache.begin(0, _ids(1))
    assert cache.grow(0, 4) and cache.held == 1
    assert cache.grow(0, 5) and cache.held == 2
    cache.begin(1, _ids(*range(5)))
    assert not cache.grow(0, 9) and _row(cache, 0)[2] == 0
    cache.release(1)
    assert cache.grow(0, 9) and cache.held == 3
    cache.check_integrity()


def test_where_the_page_to_be_copied_is_the_last_room_it_is_taken_instead() -> None:
    cache = _cache(max_context=8, kv_pages=2)
    cache.begin(0, _ids(*range(6)))
    cache.share(0, _ids(*range(6)))
    cache.release(0)
    assert cache.begin(1, _ids(*range(8))) == Begun(cached_tokens=4, copy=None)
    cache.check_integrity()


def test_misuse_and_an_account_that_does_not_add_up_are_told() -> None:
    cache = _cache()
    cache.begin(0, _ids(1, 2))
    with pytest.raises(ValueError, match="sequence 0 has begun already"):
        cache.begin(0, _ids(1))
    with pytest.raises(ValueError, match="17 tokens were asked for"):
        cache.begin(1, _ids(*range(17)))
    with pytest.raises(ValueError, match="sequence 5 has not begun"):
        cache.release(5)
    cache._free.append(_row(cache, 0)[0])
    with pytest.raises(AssertionError, match="free and in use"):
        cache.check_integrity()


_CALLS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 16), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=60
)


@given(_CALLS, st.integers(4, 12), st.sampled_from(["version", "session"]))
@settings(max_examples=100, deadline=None)
def test_the_account_holds_and_what_is_found_is_right_through_any_order_of_calls(
    calls: list[tuple[int, int, int, int]], pages: int, reuse: str
) -> None:
    cache, version, since = _cache(kv_pages=pages, reuse=reuse, max_kv_age=2), 0, dict[int, int]()
    device: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, offset): the whole prefix whose last token lies there
    running: dict[int, list[int]] = {}

    def write(key: int, start: int, ids: list[int]) -> None:
        row = _row(cache, key)
        for at in range(start, len(ids)):
            device[row[at // 4], at % 4] = tuple(ids[: at + 1])

    for slot, size, text, what in calls:
        if slot not in running:
            ids = [text, *range(size - 1)]
            begun = cache.begin(slot, np.array(ids, np.int32), what // 4, str(slot % 2))
            if begun is not None:
                since[slot] = version if begun.oldest is None else begun.oldest
                if begun.copy is not None:
                    device.update({(begun.copy[1], at): device.get((begun.copy[0], at), ()) for at in range(4)})
                write(slot, begun.cached_tokens, ids)
                running[slot] = ids
        elif what < 5 and len(running[slot]) < 16 and cache.grow(slot, len(running[slot]) + 1):
            running[slot].append(50 + what)
            write(slot, len(running[slot]) - 1, running[slot])
        elif what == 9:
            version += 1
            cache.serve(version)
        else:
            oldest = None if since[slot] == version else since[slot]
            cache.share(slot, np.array(running[slot], np.int32), str(slot % 2), oldest)
            cache.release(slot)
            del running[slot]
        cache.check_integrity()
        for key, ids in running.items():
            row = _row(cache, key)
            assert [device[row[at // 4], at % 4] for at in range(len(ids))] == [
                tuple(ids[: at + 1]) for at in range(len(ids))
            ]
