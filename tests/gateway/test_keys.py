"""Keys of sessions, and logs that hold none."""

from __future__ import annotations

import pytest

from forgejax.gateway.keys import get_logger, hide_keys, make_key


def test_a_key_has_192_random_bits_and_is_hidden_wherever_it_stands() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100 and {len(key) for key in keys} == {len("fjx-") + 192 // 6}
    assert {hide_keys(f"POST /key/{key}/v1 Bearer {key}") for key in keys} == {"POST /key/fjx-.../v1 Bearer fjx-..."}


def test_a_traceback_that_quotes_a_key_is_written_without_it(caplog: pytest.LogCaptureFixture) -> None:
    key, log = make_key(), get_logger("forgejax.gateway.test")
    assert get_logger("forgejax.gateway.test") is log and len(log.filters) == 1
    try:
        raise ValueError(f"Bearer {key}")
    except ValueError:
        log.exception("%s failed", key)
    assert "ValueError: Bearer fjx-..." in caplog.text and "fjx-... failed" in caplog.text
    assert key not in caplog.text
