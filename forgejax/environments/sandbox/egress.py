"""The one address that a sandbox reaches: a port of its own network, answered from outside."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from forgejax.environments.sandbox.processes import Root, find_parent, find_root

_UNPRIVILEGED = 1024
_CHUNK = 64 * 1024
_CONNECTIONS = 64
_PEER = struct.Struct("3i")  # process, user, group
_GONE = (BrokenPipeError, ConnectionResetError, FileNotFoundError, ProcessLookupError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Egress:
    """Where calls to ``127.0.0.1:inside`` in a sandbox lead to."""

    host: str
    port: int

    @property
    def inside(self) -> int:
        """``port``, or another where only a privileged program could listen at that."""
        return self.port if self.port >= _UNPRIVILEGED else self.port + _UNPRIVILEGED

    @classmethod
    def of(cls, url: str) -> Egress:
        """The one to an http address. Raises ValueError for another."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url} is no http address; a sandbox reaches no other")
        return cls(host=parts.hostname, port=parts.port or 80)

    def localise(self, url: str) -> str:
        """``url`` as it reads inside."""
        return urlsplit(url)._replace(netloc=f"127.0.0.1:{self.inside}").geturl()


@contextlib.asynccontextmanager
async def open_door(place: Path, egress: Egress) -> AsyncIterator[asyncio.Future[Root]]:
    """Waits at a Unix socket at ``place`` for one sandbox that hands out its listening socket, and answers there.

    The context is the sandbox's first process, once it is there. What has connected is cut off when the context ends,
    and at once where there are ``_CONNECTIONS`` already: each costs this process two open files.
    """
    loop = asyncio.get_running_loop()
    root: asyncio.Future[Root] = loop.create_future()
    servers: list[asyncio.Server] = []
    pumps: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(pumps) >= _CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(_relay(reader, writer, egress))
        pumps.add(task)
        task.add_done_callback(pumps.discard)

    async def wait() -> None:
        with contextlib.closing(door):
            await _await_readable(door)
            connection, _ = door.accept()
            with connection, contextlib.suppress(*_GONE):  # who went away while it entered
                process, *_ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
                root.set_result(find_root(find_parent(process)))
                connection.settimeout(5.0)
                _, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 1, 1)
                for descriptor in descriptors:
                    listening = socket.socket(fileno=descriptor)
                    listening.setblocking(False)
                    servers.append(await asyncio.start_server(accept, sock=listening))
                await asyncio.to_thread(connection.sendall, b"\0")

    door = socket.socket(socket.AF_UNIX)
    door.setblocking(False)
    door.bind(str(place))
    door.listen(1)
    waiting = asyncio.create_task(wait())
    try:
        yield root
    finally:
        waiting.cancel()
        root.cancel()
        for server in servers:
            server.close()
        for pump in list(pumps):
            pump.cancel()
        ended = await asyncio.gather(waiting, *pumps, return_exceptions=True)
        for problem in ended:
            if isinstance(problem, Exception):
                _log.warning("the egress of a sandbox failed: %s: %s", type(problem).__name__, problem)


async def _await_readable(of: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(of, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(of)


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, egress: Egress) -> None:
    """Copies bytes both ways until both sides have ended, or one is gone."""
    try:
        there, away = await asyncio.open_connection(egress.host, egress.port)
    except OSError as error:
        _log.warning("the gateway at %s:%d does not answer a sandbox: %s", egress.host, egress.port, error)
        writer.transport.abort()
        return
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_pump(reader, away))
            both.create_task(_pump(there, writer))
    except* OSError:
        pass  # a side went away; the other is told by the connection's end
    finally:
        for side in (writer, away):
            side.transport.abort() if side.transport.get_write_buffer_size() else side.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
