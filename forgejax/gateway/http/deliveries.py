"""Which answers were read: a connection that is reset took what lay unread in it with it."""

from __future__ import annotations

import asyncio

from aiohttp import web

from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.side_calls.canned import Answering


class Deliveries:
    """The last answer on each open connection. Whoever asks again on a connection has read the answer before.

    A peer that closes a socket in which bytes lie unread resets the connection; one that has read them all ends it.
    """

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._last: dict[asyncio.BaseTransport, Answering] = {}

    def watch(self, server: web.Server) -> None:
        """Hears of every connection that ``server`` loses."""
        lose = server.connection_lost

        def note_loss(handler: web.RequestHandler, error: BaseException | None = None) -> None:
            pending = None if handler.transport is None else self._last.pop(handler.transport, None)
            if pending is not None:
                pending.left = True
                if error is not None:
                    self._mark_unread(pending)
            lose(handler, error)

        server.connection_lost = note_loss  # type: ignore[method-assign,assignment]

    def note_answer(self, transport: asyncio.BaseTransport | None, pending: Answering, *, written: bool) -> None:
        """An answer that is complete was written to ``transport``, or could not be written as a whole."""
        if transport is not None:
            self._last.pop(transport, None)
        if not written or transport is None:
            self._mark_unread(pending)
        else:
            pending.undelivered = pending.left = False
            self._last[transport] = pending

    def _mark_unread(self, pending: Answering) -> None:
        pending.undelivered = True
        self._metrics.undelivered.inc()
