"""An answer that is there from the start: it was given by a rule, and no token was drawn for it."""

from __future__ import annotations

from collections.abc import Sequence

from forgejax.chat.messages import Message
from forgejax.chat.reply import Delta, Reply, Usage
from forgejax.gateway.pending import PendingReply
from forgejax.gateway.refusals import RefusedError


class CannedReply:
    """Stands where a ``PendingReply`` does."""

    prompt_tokens = 0
    answered = True
    replayed = True  # its deltas are those of the whole reply

    def __init__(self, reply_id: str, text: str) -> None:
        self.id = reply_id
        self.undelivered = self.left = False
        self._reply = Reply(
            message=Message.of_text("assistant", text),
            finish="stop",
            usage=Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0),
            signature=reply_id,
        )

    async def wait_reply(self) -> Reply:
        return self._reply

    async def wait_deltas(self, silence_s: float | None = None) -> Sequence[Delta]:
        return ()

    def abandon(self, why: RefusedError) -> None:
        """There is nothing to end."""


Answering = PendingReply | CannedReply
"""What a session answers a request with."""
