"""What a session remembers between requests."""

from __future__ import annotations

from forgejax.gateway.memory import ReplyMemory

USER = {"role": "user", "content": "?"}
SAID = {"role": "assistant", "content": "5"}


def test_a_history_is_found_under_its_replys_id_as_it_was_then() -> None:
    memory = ReplyMemory()
    history = [USER, SAID]
    memory.remember("r1", history)
    history.append(USER)
    assert memory.recall("r1") == (USER, SAID)
    assert memory.recall("r2") is None


def test_nothing_is_found_after_it_was_forgotten() -> None:
    memory = ReplyMemory()
    memory.remember("r1", (USER, SAID))
    memory.forget()
    assert memory.recall("r1") is None
