"""Laws of what one server process drew for the trainer."""

from __future__ import annotations

from typing import Any

from forgejax.rollout import EngineAccount
from forgejax.rollout.fleet.books import ServerBooks
from forgejax.rollout.server.admin import StatusBody


def status(**changed: Any) -> StatusBody:
    counts = dict.fromkeys(("slots", "active", "waiting", "sampled", "returned", "cancelled", "failed"), 0)
    counts |= dict.fromkeys(("prompt_tokens", "cached_tokens", "computed_tokens", "inherited", "damaged"), 0)
    state: dict[str, Any] = {"instance": "one", "state": "serving", "healthy": True, "version": 0, "publication": ""}
    return StatusBody(**(state | counts | changed))


def test_what_was_drawn_and_never_given_is_cancelled_however_the_server_counted_it() -> None:
    books = ServerBooks(status(sampled=100, returned=100))  # for others, before
    books.give(30)  # 30 of the 40 that it says it returned: the end of one answer was lost
    books.give(4)  # of a request that was stopped here; it drew 7 until it heard of that
    books.last = status(sampled=162, returned=140, cancelled=7, failed=5, active=2, prompt_tokens=50, cached_tokens=20)
    assert books.count(3, reached=True) == EngineAccount(
        sampled=62, cancelled=13, failed=5, open=10, prompt_tokens=50, cached_tokens=20, active=2, waiting=1
    )
    assert 62 == 34 + 13 + 5 + 10
    books.break_off("seen", 40)
    assert books.count(3, reached=False) == EngineAccount(sampled=74, lost=40, prompt_tokens=50, cached_tokens=20)


def test_the_log_of_a_process_that_was_killed_says_what_it_drew_and_what_was_seen_besides() -> None:
    books = ServerBooks(status(inherited=1_000))
    books.last = status(sampled=50, returned=40, inherited=1_000)
    books.give(60)
    books.break_off("seen", 8)  # no record of it: the process was killed while it drew
    books.break_off("logged", 6)  # its end was written, and did not arrive
    books.close(1_066, lambda name: name == "logged")
    assert books.count(0, reached=False) == EngineAccount(sampled=74, lost=14)


def test_without_its_log_a_process_drew_what_it_said_or_what_was_seen() -> None:
    books = ServerBooks(status())
    books.last = status(sampled=50)
    books.give(45)
    books.break_off("seen", 3)
    books.close(None, lambda _: False)
    assert books.count(0, reached=True) == EngineAccount(sampled=50, lost=5)
