"""What a session remembers between requests, for wire formats whose agents send only what is new."""

from __future__ import annotations

from collections.abc import Sequence

from forgejax.chat.messages import Message


class ReplyMemory:
    """The histories of one session, each under the id of the reply it ends in.

    Only the histories that a request asked to keep are here; they go with the session.
    """

    def __init__(self) -> None:
        self._histories: dict[str, tuple[Message, ...]] = {}

    def remember(self, reply_id: str, messages: Sequence[Message]) -> None:
        """Keeps the messages that were asked, the reply's own at the end."""
        self._histories[reply_id] = tuple(messages)

    def recall(self, reply_id: str) -> tuple[Message, ...] | None:
        """The messages up to that reply, its own included; None where this session keeps none under the id."""
        return self._histories.get(reply_id)

    def forget(self) -> None:
        self._histories.clear()
