"""Who may ask: every session by its key and its id, open or closed lately."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import replace
from typing import Protocol

from forgejax.errors import GatewayError
from forgejax.gateway.records.base import SessionRecords
from forgejax.gateway.refusals import RefusedError, refuse_closed_session
from forgejax.gateway.service import Service
from forgejax.gateway.sessions import SessionLog
from forgejax.types import SessionSpec, Turn

_CLOSED_KEPT = 64  # sessions that can be closed again; their turns take memory
_KEYS_KEPT = 1024  # of sessions closed before those


class SessionFinder(Protocol):
    """Tells whose request it is that carries a key."""

    def find(self, api_key: str | None, credential_form: str) -> SessionLog:
        """The open session of a key; ``credential_form`` says how keys are sent, for whoever sent none.

        Raises RefusedError.
        """
        ...


class SessionTable:
    """Every open session, the last closed ones, and the keys of more, so that late requests are told what happened."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._by_key: dict[str, SessionLog] = {}
        self._by_id: dict[str, SessionLog] = {}
        self._closed: OrderedDict[str, SessionLog] = OrderedDict()
        self._late_keys: OrderedDict[str, None] = OrderedDict()

    def open(self, spec: SessionSpec) -> SessionLog:
        session = SessionLog(self._service, spec)
        self._by_key[session.api_key] = session
        self._by_id[session.id] = session
        self._service.metrics.sessions.inc()
        return session

    def find(self, api_key: str | None, credential_form: str) -> SessionLog:
        """The open session of a key; ``credential_form`` says how keys are sent, for whoever sent none.

        Raises RefusedError: 410 for a session that is closed or past its deadline, 401 for no or an unknown key.
        """
        session = None if api_key is None else self._by_key.get(api_key)
        if session is not None:
            if session.refusal is not None:
                raise session.refusal
            return session
        if api_key in self._late_keys:
            raise refuse_closed_session()
        if self._service.config.allow_anonymous:
            unrecorded = replace(self._service, records=SessionRecords())
            return SessionLog(unrecorded, SessionSpec(purpose="evaluation"), kept=False)
        given = "no API key was sent" if api_key is None else "the API key is unknown"
        raise RefusedError(401, f"{given}; send the session's key as '{credential_form}'", code="invalid_api_key")

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        """Closes a session and gives its turns; again the same turns for one closed lately."""
        session = self._by_id.get(session_id)
        if session is None:
            raise GatewayError(f"there is no session {session_id}; it was never opened, or closed long ago")
        if session.closed:
            return await session.close()
        turns = await session.close()
        self._service.metrics.sessions.dec()
        self._closed[session_id] = session
        if len(self._closed) > _CLOSED_KEPT:
            _, oldest = self._closed.popitem(last=False)
            del self._by_key[oldest.api_key], self._by_id[oldest.id]
            self._late_keys[oldest.api_key] = None
            if len(self._late_keys) > _KEYS_KEPT:
                self._late_keys.popitem(last=False)
        return turns

    async def close_all(self) -> None:
        await asyncio.gather(*(self.close(id_) for id_, session in tuple(self._by_id.items()) if not session.closed))
