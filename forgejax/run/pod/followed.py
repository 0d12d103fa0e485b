"""A follower's end: what the leader orders, one after another, and how it is told what became of it."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from forgejax.errors import ForgejaxError, PodError
from forgejax.run.pod.hello import Hello
from forgejax.run.pod.leader import ADDRESS, LOST, SECRET
from forgejax.run.pod.wire import Link, pack_message, reach_leader
from forgejax.sharding import DistributedConfig, Processes

_END_S = 20.0


class Followed:
    """The connection to the leader. Where that is lost, or gives the job up, this process ends at once, with a
    sentence: its main thread may be waiting for collectives that nobody takes part in any more.

    ``address`` is this machine's, as the leader reaches it; ``secret`` the job's.
    """

    def __init__(
        self,
        config: DistributedConfig,
        processes: Processes,
        own: Hello,
        leave: Callable[[int], object] = os._exit,
    ):
        """``leave`` ends this process at once, with a code. Raises PodError or MeshError where the leader cannot be
        reached."""
        self._leave = leave
        self.secret = processes.hear(SECRET, config.start_s)
        leader = processes.hear(ADDRESS, config.start_s)
        connection, self.address = reach_leader(leader, self.secret.encode(), silence_s=config.silence_s)
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._link = Link(
            connection,
            silence_s=config.silence_s,
            on_message=self._take,
            on_lost=lambda why: self._end_at_once(f"{own.name}: the leader at {processes.host} is lost: {why}"),
        )
        self._link.start()
        self._link.send(pack_message(("hello", own)))

    def carry_out(self, orders: Mapping[str, Callable[..., Any]], asked: frozenset[str]) -> int:
        """Does what the leader says, until it ends the job; gives the exit code.

        The answers to those ``asked`` are what their functions give.

        Raises PodError where the leader has refused to begin, with its sentence.
        """
        while True:
            kind, *rest = self._orders.get()
            if kind == "end":
                self._link.close()
                return int(rest[0])
            if kind == "refuse":
                self._late.cancel()
                self._link.close()
                raise PodError(f"the leader has ended the job: {rest[0]}")
            number, name, args = rest
            value, sentence = None, ""
            try:
                value = orders[name](*args)
            except ForgejaxError as error:
                sentence = str(error)
            except Exception as error:  # noqa: BLE001  a boundary: whatever it is, all must end
                traceback.print_exc()
                sentence = f"{type(error).__name__}: {error}"
            del args  # a step's arrays
            answer = value if name in asked else None
            self._link.send(pack_message(("done", number, answer, sentence, name in asked)))

    def ask_to_stop(self) -> None:
        """Has the leader end the run after the step it is in, with a checkpoint."""
        self._link.send(pack_message(("stop",)))

    def _take(self, message: Any) -> None:
        if message[0] == "abandon":
            self._end_at_once(f"the leader has given the job up: {message[1]}")
            return
        if message[0] == "refuse":  # in the midst of something that may need the leader
            self._late = threading.Timer(_END_S, self._end_at_once, (f"the leader has ended the job: {message[1]}",))
            self._late.daemon = True
            self._late.start()
        self._orders.put(message)

    def _end_at_once(self, sentence: str) -> None:
        print(f"train.py: {sentence}", file=sys.stderr, flush=True)
        self._leave(LOST)
