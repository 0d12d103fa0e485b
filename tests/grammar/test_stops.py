"""Where texts end that are looked for token by token."""

from __future__ import annotations

import numpy as np
import pytest

from forgejax.grammar import StopWatch
from tests.grammar.words import WORDS


@pytest.mark.parametrize("seed", range(20))
def test_a_string_is_found_at_the_token_that_completes_it_however_the_text_is_cut(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.choice([ord("a"), ord("b"), 256, 257, 258, len(WORDS) + 5], 60).tolist()
    stops = ["".join(random.choice(["a", "b", '{"'], 3)) for _ in range(3)]
    spelled = [b"".join(WORDS[id_] for id_ in ids[: n + 1] if id_ < len(WORDS)).decode() for n in range(60)]
    expected = next((n + 1 for n, text in enumerate(spelled) if any(stop in text for stop in stops)), None)
    watch, found, fed = StopWatch(WORDS, stops), None, 0
    while found is None and fed < 60:
        run = ids[fed : fed + int(random.integers(1, 5))]
        found = watch.find_end(run)
        fed += len(run) if found is None else 0
    assert expected == (None if found is None else fed + found)


def test_a_character_in_several_tokens_ends_a_text_with_its_last() -> None:
    assert StopWatch(WORDS, ["\u00e9!"]).find_end([*"caf\u00e9!".encode(), ord("x")]) == 6
