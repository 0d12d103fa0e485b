"""One session of an OpenEnv server: JSON messages on its WebSocket ``/ws``, each answered in order.

``{"type": "reset" | "step" | "state" | "close", "data": {...}}`` goes out; ``observation`` (with ``observation``,
``reward`` and ``done``), ``state`` or ``error`` (with ``code`` and ``message``) comes back. A server with no room says
``CAPACITY_REACHED`` and closes (openenv-core 0.3, ``env_server/http_server.py``).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from forgejax.errors import EnvironmentLostError

FULL = "CAPACITY_REACHED"
REFUSED = ("VALIDATION_ERROR", "EXECUTION_ERROR")
MESSAGE_BYTES = 16 * 1024 * 1024
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


class RefusedStepError(EnvironmentLostError):
    """The server refuses an action, or failed at it, and the session goes on."""


class _FullError(Exception):
    """The server has no room for another session."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a reset or a step gave. ``reward`` is None where there was none."""

    observation: Mapping[str, Any]
    reward: float | None
    done: bool


class Connection:
    """A session; requests take turns. ``message_s`` is the deadline of each."""

    def __init__(self, http: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, message_s: float) -> None:
        self._http, self._socket, self._message_s = http, socket, message_s
        self._turn = asyncio.Lock()

    async def step(self, action: Mapping[str, Any]) -> Observed:
        """Raises RefusedStepError where the action is refused, EnvironmentLostError where the session is over."""
        return await self._observe("step", action)

    async def read_state(self) -> Mapping[str, Any]:
        """The server's own account of the session. Raises EnvironmentLostError."""
        return await self._ask("state", None)

    async def close(self) -> None:
        """Ends the session, also with a server that is gone."""
        try:
            await self._socket.send_json({"type": "close"})
        except (aiohttp.ClientError, ConnectionError):
            pass  # it is closed already, which is what was wanted
        finally:
            await self._socket.close()
            await self._http.close()

    async def _observe(self, kind: str, data: Mapping[str, Any]) -> Observed:
        return _read_observed(await self._ask(kind, data))

    async def _ask(self, kind: str, data: Mapping[str, Any] | None) -> Mapping[str, Any]:
        async with self._turn:
            try:
                async with asyncio.timeout(self._message_s):
                    await self._socket.send_json({"type": kind} | ({} if data is None else {"data": data}))
                    text = await self._socket.receive_str()
            except TimeoutError as error:
                raise EnvironmentLostError(f"no answer to a {kind} within {self._message_s:g} s") from error
            except (aiohttp.ClientError, aiohttp.WSMessageTypeError, ConnectionError) as error:
                raise EnvironmentLostError(f"the connection ended at a {kind}: {error!r}") from error
        return _read_answer(kind, text)


async def open_connection(
    url: str, reset: Mapping[str, Any], *, open_s: float, message_s: float
) -> tuple[Connection, Observed]:
    """A new session and what its reset gave. A server that is full is asked again until ``open_s`` have passed.

    Raises EnvironmentLostError where there is no server, it stays full, or it refuses the reset.
    """
    until, wait_s = time.monotonic() + open_s, _FIRST_WAIT_S
    while True:
        try:
            return await _open_once(url, reset, message_s)
        except _FullError as error:
            if time.monotonic() + wait_s > until:
                raise EnvironmentLostError(
                    f"the OpenEnv server at {url} had no room for a session within {open_s:g} s: {error}; raise its "
                    "max_concurrent_envs, or lower pool.window.in_flight or run.group_size"
                ) from error
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


async def _open_once(url: str, reset: Mapping[str, Any], message_s: float) -> tuple[Connection, Observed]:
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=message_s))
    connection = None
    try:
        socket = await http.ws_connect(f"{url.rstrip('/')}/ws", max_msg_size=MESSAGE_BYTES)
        connection = Connection(http, socket, message_s)
        return connection, await connection._observe("reset", reset)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        await http.close()
        raise EnvironmentLostError(
            f"no OpenEnv session at {url}: {error!r}; is the server up, and tasks.openenv.url its address?"
        ) from error
    except BaseException:
        await (http.close() if connection is None else connection.close())
        raise


def _read_answer(kind: str, text: str) -> Mapping[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise EnvironmentLostError(f"the answer to a {kind} is {text[:200]!r}; expected a JSON object") from error
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict):
        raise EnvironmentLostError(f"the answer to a {kind} is {text[:200]!r}; expected an object with data")
    if answer.get("type") != "error":
        return data
    code, message = data.get("code"), data.get("message")
    if code == FULL:
        raise _FullError(str(message))
    if code in REFUSED and kind == "step":
        raise RefusedStepError(str(message))
    raise EnvironmentLostError(f"the server refused a {kind} with {code}: {message}")


def _read_observed(data: Mapping[str, Any]) -> Observed:
    observation, reward = data.get("observation"), data.get("reward")
    if not isinstance(observation, dict) or not isinstance(reward, bool | int | float | None):
        raise EnvironmentLostError(
            f"the server gave {str(dict(data))[:200]}; expected an observation that is an object, and a reward that is "
            "a number or null"
        )
    return Observed(
        observation=observation, reward=None if reward is None else float(reward), done=bool(data.get("done"))
    )
