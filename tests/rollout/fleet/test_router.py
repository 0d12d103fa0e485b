"""Laws of where requests go."""

from __future__ import annotations

import numpy as np

from forgejax.rollout.fleet.router import EngineLoad, Router
from tests.rollout import tiny


def loads(*requests: int, tokens: int = 40, slots: int = 4) -> list[EngineLoad]:
    """Engines 0, 1, ... with so many requests each."""
    return [
        EngineLoad(number=number, slots=slots, requests=count, tokens=count * tokens)
        for number, count in enumerate(requests)
    ]


def test_a_session_stays_where_it_began_however_much_is_to_do_there() -> None:
    router = Router()
    first = router.choose(tiny.request("a", tiny.prompt(0, 40), session_id="s"), loads(3, 0))
    again = router.choose(tiny.request("b", tiny.prompt(1, 40), session_id="s"), loads(0, 9))
    other = router.choose(tiny.request("c", tiny.prompt(2, 40), session_id="t"), loads(0, 9))
    assert (first, again, other) == (1, 1, 0)
    assert (router.requests, router.kept) == (3, 1)


def test_a_session_whose_engine_is_gone_has_another_home_from_then_on() -> None:
    router = Router()
    request = tiny.request("a", tiny.prompt(0, 40), session_id="s")
    assert router.choose(request, loads(0, 3)) == 0
    assert router.choose(request, loads(0, 3)[1:]) == 1
    assert router.choose(request, loads(0, 3)) == 1


def test_a_prompt_goes_where_most_of_it_is_cached_until_that_costs_more_than_computing_it() -> None:
    router, prompt = Router(), tiny.prompt(0, 64)
    assert router.choose(tiny.request("a", prompt), loads(0, 0)) == 0
    longer = np.concatenate([prompt, tiny.prompt(1, 10)])
    # 64 tokens are saved there; what the others hold there, 5 x 40 tokens over 4 slots, costs 50, and nobody waits.
    assert router.choose(tiny.request("b", longer), loads(3, 0)) == 0
    assert router.expected_tokens == 64 and router.prompt_tokens == 138
    # Two wait there, as long as an open request holds tokens: 2 x 40 more.
    assert router.choose(tiny.request("c", longer), loads(5, 0)) == 1


def test_what_differs_before_is_no_prefix() -> None:
    router, prompt = Router(), tiny.prompt(0, 64)
    router.choose(tiny.request("a", prompt), loads(0, 1))
    changed = prompt.copy()
    changed[0] += 1
    assert router.choose(tiny.request("b", changed), loads(1, 0)) == 1
    assert router.expected_tokens == 0


def test_an_engine_with_new_weights_has_no_prompt_cached() -> None:
    router, prompt = Router(), tiny.prompt(0, 64)
    assert router.choose(tiny.request("a", prompt), loads(0, 1)) == 0
    router.forget(0)
    assert router.choose(tiny.request("b", prompt), loads(1, 0)) == 1
