"""What a session remembers between requests, for wire formats whose agents send only what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgejax.chat.messages import Message


@dataclass(frozen=True, kw_only=True)
class StoredReply:
    """A reply and the messages up to it, its own included; ``body`` is the answer as it was worded; its
    parts, if they have ids of their own, are its ``output``."""

    messages: tuple[Message, ...]
    body: Mapping[str, Any]


class ReplyMemory:
    """The replies of one session that a request asked to keep, each under its id; they go with the session."""

    def __init__(self) -> None:
        self._replies: dict[str, StoredReply] = {}
        self._items: dict[str, Mapping[str, Any]] = {}

    def remember(self, reply_id: str, messages: Sequence[Message], body: Mapping[str, Any]) -> None:
        """Keeps the messages that were asked, the reply's own at the end."""
        self._replies[reply_id] = StoredReply(messages=tuple(messages), body=body)
        self._items.update({item["id"]: item for item in body.get("output", ())})

    def recall(self, reply_id: str) -> StoredReply | None:
        """None where this session keeps none under the id."""
        return self._replies.get(reply_id)

    def find_item(self, item_id: str) -> Mapping[str, Any] | None:
        """The output item of a kept reply that has this id."""
        return self._items.get(item_id)

    def remove(self, reply_id: str) -> bool:
        """Whether there was one."""
        removed = self._replies.pop(reply_id, None)
        for item in () if removed is None else removed.body.get("output", ()):
            self._items.pop(item["id"], None)
        return removed is not None

    def forget(self) -> None:
        self._replies.clear()
        self._items.clear()
