"""Load on an HTTP server, over bare sockets: a client that costs little beside what it measures."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ANSWER_S = 120.0
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and the path that is asked."""

    host: str
    port: int
    path: str

    def word(self, body: bytes, key: str) -> bytes:
        """A request as it goes over the wire."""
        lines = (
            f"POST {self.path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            f"Authorization: Bearer {key}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class Connection(asyncio.Protocol):
    """A connection that stays open. ``ask`` gives an answer that says its length; ``watch`` follows a stream."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._news = asyncio.Event()
        self.lost = False

    @classmethod
    async def open(cls, address: Address) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address.host, address.port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._news.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        self._news.set()

    def close(self) -> None:
        self._transport.abort()

    async def ask(self, request: bytes) -> int:
        """The status of an answer that has arrived whole."""
        self._transport.write(request)
        size: int | None = None
        while size is None or len(self._received) < size:
            await self._wait()
            head = self._received.find(b"\r\n\r\n")
            if size is None and head >= 0:
                length = _LENGTH.search(self._received, 0, head)
                if length is None:
                    raise SystemExit(f"an answer without a length: {bytes(self._received[:200])!r}")
                size = head + 4 + int(length[1])
        status = int(self._received[9:12])
        del self._received[:size]
        return status

    async def watch(self, request: bytes, until: float) -> tuple[float, int, bool]:
        """Follows a stream until ``until``: seconds to its first event, events, and whether it was alive by then."""
        asked = time.perf_counter()
        self._transport.write(request)
        first, events, headed = 0.0, 0, False
        while time.perf_counter() < until and not self.lost:
            try:
                async with asyncio.timeout(until - time.perf_counter()):
                    await self._wait()
            except TimeoutError:
                break
            if not headed and not self._received.startswith(b"HTTP/1.1 200"):
                return 0.0, 0, False
            headed = True
            counted = self._received.count(b"data: ")
            first = first or (time.perf_counter() - asked if counted else 0.0)
            events += counted
            ended = b"[DONE]" in self._received
            self._received.clear()
            if ended:
                return first, events, False
        return first, events, not self.lost

    async def _wait(self) -> None:
        if self.lost:
            raise SystemExit(f"the server closed a connection; it had sent {bytes(self._received[-200:])!r}")
        async with asyncio.timeout(ANSWER_S):
            await self._news.wait()
        self._news.clear()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a load brought: seconds of each answer, in order of their end, and of all of it."""

    latencies: Sequence[float]
    seconds: float

    def percentile(self, share: float) -> float:
        """Seconds that ``share`` of the answers took at most."""
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


async def apply_load(address: Address, requests: Sequence[bytes], concurrency: int) -> Load:
    """Asks ``requests`` over ``concurrency`` connections, each sending its next once its last was answered."""
    latencies: list[float] = []
    left: Iterator[bytes] = iter(requests)

    async def work(connection: Connection) -> None:
        for request in left:
            began = time.perf_counter()
            status = await connection.ask(request)
            latencies.append(time.perf_counter() - began)
            if status != 200:
                raise SystemExit(f"{address.path} answered with status {status}")

    connections = [await Connection.open(address) for _ in range(concurrency)]
    began = time.perf_counter()
    await asyncio.gather(*map(work, connections))
    seconds = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return Load(latencies=latencies, seconds=seconds)
