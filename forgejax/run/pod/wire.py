"""One connection between the leader and a follower: messages both ways, and signs of life between them.

Messages are pickled: both ends are the same code on hosts of one job, and have shown each other that they know its
secret (``multiprocessing.connection``'s HMAC) before the first is read.
"""

from __future__ import annotations

import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from forgejax.errors import PodError

_BEATS = 4  # signs of life within the time that a silent one is given
_FLUSH_S = 5.0


class Link:
    """Its threads send what is queued and hand on what comes; ``send`` never waits for the other end.

    ``on_message`` is called for each message, ``on_lost`` once, with half a sentence, where the other end is gone or
    has been silent for ``silence_s``: both in threads of the link.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        silence_s: float,
        on_message: Callable[[Any], None],
        on_lost: Callable[[str], None],
    ):
        self._connection, self._silence_s = connection, silence_s
        self._on_message, self._on_lost = on_message, on_lost
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._once = threading.Lock()
        self._ended = False
        self._sender = threading.Thread(target=self._send_on, name="pod-sender", daemon=True)
        self._reader = threading.Thread(target=self._read_on, name="pod-reader", daemon=True)

    def start(self) -> None:
        self._sender.start()
        self._reader.start()

    def send(self, message: bytes) -> None:
        """Queues what ``pack_message`` made."""
        self._outbox.put(message)

    def close(self) -> None:
        """Sends what is queued, as far as the other end takes it, and ends. Nothing counts as lost any more."""
        self._ended = True
        self._outbox.put(None)
        self._sender.join(_FLUSH_S)

    def _send_on(self) -> None:
        beat = pack_message(None)
        try:
            while True:
                try:
                    message = self._outbox.get(timeout=self._silence_s / _BEATS)
                except queue.Empty:
                    message = beat
                if message is None:
                    return
                self._connection.send_bytes(message)
        except OSError as error:
            self._lose(error)

    def _read_on(self) -> None:
        try:
            while True:
                message = pickle.loads(self._connection.recv_bytes())
                if message is not None:
                    self._on_message(message)
        except (OSError, EOFError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        with self._once:
            if self._ended:
                return
            self._ended = True
        silent = isinstance(error, BlockingIOError)
        self._on_lost(f"it gave no sign of life for {self._silence_s:g} s" if silent else "its connection has ended")


def pack_message(message: Any) -> bytes:
    """What ``Link.send`` takes; None is a sign of life. Made once for all followers."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def listen(host: str) -> socket.socket:
    """A port for followers: of this machine alone where the job is on it alone, else of all its addresses."""
    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    return socket.create_server((host if loopback else "", 0), backlog=4096)


def accept(server: socket.socket, secret: bytes, *, silence_s: float) -> Connection | None:
    """The next follower's connection, or None where whoever came does not know the secret. Raises TimeoutError by the
    server's timeout."""
    accepted, _ = server.accept()
    connection = _connect_pipe(accepted, silence_s)
    try:
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
    except (AuthenticationError, OSError, EOFError):
        connection.close()
        return None
    return connection


def reach_leader(address: str, secret: bytes, *, silence_s: float) -> tuple[Connection, str]:
    """The leader's end, and this machine's address as the leader can reach it. Raises PodError."""
    host, _, port = address.rpartition(":")
    try:
        made = socket.create_connection((host, int(port)), timeout=silence_s)
        own: str = made.getsockname()[0]
        connection = _connect_pipe(made, silence_s)
        answer_challenge(connection, secret)
        deliver_challenge(connection, secret)
    except (AuthenticationError, OSError, EOFError) as error:
        raise PodError(
            f"the leader cannot be reached at {address}: {error}; hosts of a job must reach each other on any port"
        ) from error
    return connection, own


def _connect_pipe(made: socket.socket, silence_s: float) -> Connection:
    """Its reads and writes fail with BlockingIOError once the other end has been silent, or read nothing, so long."""
    made.setblocking(True)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack("ll", int(silence_s), int(silence_s % 1 * 1e6))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Connection(made.detach())
