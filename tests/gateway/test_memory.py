"""What a session keeps of its replies."""

from __future__ import annotations

from forgejax.chat.messages import Message
from forgejax.gateway.memory import ReplyMemory, StoredReply

ASKED = Message.of_text("user", "?")
SAID = Message.of_text("assistant", "!")


def test_a_reply_is_recalled_under_its_own_id_until_it_is_removed_or_all_are_forgotten() -> None:
    memory = ReplyMemory()
    memory.remember("a", [ASKED, SAID], {"id": "a"})
    memory.remember("b", [ASKED, SAID, ASKED, SAID], {"id": "b"})
    assert memory.recall("a") == StoredReply(messages=(ASKED, SAID), body={"id": "a"})
    assert memory.remove("a") and not memory.remove("a") and memory.recall("a") is None
    memory.forget()
    assert memory.recall("b") is None
