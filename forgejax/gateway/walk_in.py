"""Sessions that nobody opens: a gateway that stands alone opens one for every key that it does not know."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forgejax.errors import ConfigError
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.session_table import SessionTable
from forgejax.gateway.sessions import SessionLog
from forgejax.types import SessionSpec, Turn

_FULL_S = 30.0


@dataclass(frozen=True, kw_only=True)
class StandAlone:
    """How a gateway serves whoever comes.

    A key is a session: the first request under it opens one. With a ``token`` keys are the token itself, or it, a dash
    and a name; without one any key will do. Sessions are opened with ``spec``, ``most`` at once; where one more comes,
    those that were asked nothing for ``idle_s`` seconds make room. ``admin_token`` opens the pages under ``/sessions``;
    ``look`` tells what the engine is by now, or raises EngineError.
    """

    admin_token: str
    token: str | None = None
    spec: SessionSpec = field(default_factory=SessionSpec)
    most: int = 1000
    idle_s: float = 3600.0
    look: Callable[[], Awaitable[Mapping[str, Any]]]

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ConfigError(f"{self.most} sessions may be open at once; give at least 1")
        if not 0 < self.idle_s < math.inf:
            raise ConfigError(f"sessions are closed after {self.idle_s} s; give a positive, finite number")
        if not self.admin_token or self.token == "":
            raise ConfigError("the token is empty; give one that cannot be guessed, or leave it out")


class WalkInSessions:
    """Finds the session of a key, and opens it where there is none yet, or the one there was is closed."""

    def __init__(self, sessions: SessionTable, rules: StandAlone) -> None:
        self._sessions, self._rules = sessions, rules
        self._names: dict[str, str] = {}  # of keys, by session id
        self._by_key: dict[str, SessionLog] = {}
        self._open: dict[str, SessionLog] = {}
        self._asked_at: dict[str, float] = {}
        self._closing: set[asyncio.Task[Any]] = set()

    def find(self, api_key: str | None, credential_form: str) -> SessionLog:
        """See ``SessionTable.find``. Raises RefusedError also where no more sessions may be open (429)."""
        if api_key is None:
            raise RefusedError(
                401,
                f"no API key was sent; send one as '{credential_form}': it names the session",
                code="invalid_api_key",
            )
        session = self._by_key.get(api_key)
        if session is None or session.closed:
            if not self._admits(api_key):
                raise RefusedError(401, "the API key does not begin with the gateway's token", code="invalid_api_key")
            session = self.open(self._rules.spec, api_key)
        self._asked_at[session.id] = time.monotonic()
        return session

    def open(self, spec: SessionSpec, api_key: str | None = None) -> SessionLog:
        """Opens a session under a key, its own where None. Raises RefusedError (429)."""
        self._make_room()
        session = self._sessions.open(spec)
        key = session.api_key if api_key is None else api_key
        self._by_key[key] = self._open[session.id] = session
        self._names[session.id] = key
        self._asked_at[session.id] = time.monotonic()
        return session

    def holds(self, api_key: str) -> bool:
        """Whether a session is open under a key."""
        return api_key in self._by_key and not self._by_key[api_key].closed

    def list_open(self) -> list[tuple[str, SessionLog, float]]:
        """Name, session and seconds since it was last asked, of each that is open. A name is its key without the
        token."""
        now, prefix = time.monotonic(), f"{self._rules.token}-"
        return [
            (self._names[id_].removeprefix(prefix), session, now - self._asked_at[id_])
            for id_, session in self._open.items()
        ]

    def get(self, session_id: str) -> SessionLog:
        """The open session of an id. Raises RefusedError (404)."""
        if session_id not in self._open:
            raise RefusedError(
                404, f"there is no open session {session_id}; GET /sessions lists them", code="no_session"
            )
        return self._open[session_id]

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        """Closes a session and gives its turns. Its key opens another one. Raises RefusedError (404)."""
        self.get(session_id)
        self._forget(session_id)
        return await self._sessions.close(session_id)

    def _forget(self, session_id: str) -> None:
        del self._open[session_id], self._asked_at[session_id], self._by_key[self._names.pop(session_id)]

    def _admits(self, api_key: str) -> bool:
        token = self._rules.token
        if token is None:
            return True
        given = api_key[: len(token)]
        same = hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))
        return same and api_key[len(token) : len(token) + 1] in ("", "-")

    def _make_room(self) -> None:
        if len(self._open) < self._rules.most:
            return
        now = time.monotonic()
        for id_ in [id_ for id_, asked_at in self._asked_at.items() if now - asked_at > self._rules.idle_s]:
            self._forget(id_)
            task = asyncio.ensure_future(self._sessions.close(id_))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        if len(self._open) >= self._rules.most:
            raise RefusedError(
                429,
                f"{self._rules.most} sessions are open; close one (DELETE /sessions/ID), or let more be open",
                code="too_many_sessions",
                retry_after_s=_FULL_S,
            )
