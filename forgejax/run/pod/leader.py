"""The leader's end of a job of several processes: it tells the others what to do, and ends with them."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from forgejax.errors import PodError
from forgejax.run.pod.hello import Hello, find_difference
from forgejax.run.pod.wire import Link, accept, listen, pack_message
from forgejax.sharding import DistributedConfig, Processes

LOST = 75
"""The exit code of a job that has lost a process: EX_TEMPFAIL, it can be resumed as it is."""

ADDRESS, SECRET = "leader", "secret"  # names under which followers hear of it
_LOOK_S = 0.5


@dataclass(kw_only=True)
class _Follower:
    hello: Hello
    link: Link
    open: dict[int, tuple[str, float]] = field(default_factory=dict)  # orders by number: name, and when it is too late
    answers: dict[int, Any] = field(default_factory=dict)


class Leader:
    """``Orders`` to the followers that ``gather`` has found. ``secret`` is the job's own, for its servers as well.

    A follower that is lost, fails at an order that is not asked, or is late with one ends this process and through it
    all others: nothing that waits for its collectives would ever return. The run's files are as a kill leaves them.
    """

    def __init__(self, config: DistributedConfig, leave: Callable[[int], object] = os._exit):
        """``leave`` ends this process at once, with a code."""
        self._config, self._leave = config, leave
        self.secret = secrets.token_hex(16)
        self._followers: list[_Follower] = []
        self._number = 0
        self._changed = threading.Condition()
        self._on_stop: Callable[[], None] | None = None
        self._asked_to_stop = False
        self._ended = threading.Event()

    def gather(self, processes: Processes, own: Hello) -> None:
        """Waits for every follower and compares it with this process.

        Raises PodError for one that does not come, or may not take part; the others are told.
        """
        until = time.monotonic() + self._config.start_s
        with listen(processes.host) as server:
            processes.share(SECRET, self.secret)
            processes.share(ADDRESS, f"{processes.host}:{server.getsockname()[1]}")
            while len(self._followers) < processes.count - 1:
                server.settimeout(max(0.1, until - time.monotonic()))
                try:
                    self._greet(server, own)
                except TimeoutError as error:
                    came = {follower.hello.process for follower in self._followers}
                    missing = sorted(set(range(1, processes.count)) - came)
                    raise PodError(
                        f"processes {missing} have joined the job and not said hello within {self._config.start_s:g} "
                        "s; look at what they print"
                    ) from error
        self._followers.sort(key=lambda follower: follower.hello.process)
        threading.Thread(target=self._watch, name="pod-watch", daemon=True).start()

    @property
    def hosts(self) -> list[Hello]:
        """The followers."""
        return [follower.hello for follower in self._followers]

    def watch_stop(self, on_stop: Callable[[], None]) -> None:
        """``on_stop`` is called, in another thread, where a follower is asked to end; at once where one has been."""
        with self._changed:
            self._on_stop, asked = on_stop, self._asked_to_stop
        if asked:
            on_stop()

    def give(self, name: str, *args: Any) -> None:
        """See ``Orders``."""
        self._send(name, args)

    def ask(self, name: str, *args: Any) -> list[Any]:
        """See ``Orders``."""
        number = self._send(name, args)
        with self._changed:
            self._changed.wait_for(lambda: all(number in follower.answers for follower in self._followers))
        answers = [(follower.hello, *follower.answers.pop(number)) for follower in self._followers]
        for hello, _, sentence in answers:
            if sentence:
                raise PodError(f"{hello.name}: {sentence}")
        return [value for _, value, _ in answers]

    def end(self, code: int) -> None:
        """The followers end in order, with this exit code. Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell(("end", code))

    def abandon(self, sentence: str) -> None:
        """Ends this process and all others at once."""
        if not self._ended.is_set():
            self._ended.set()
            _say(sentence)
            self._tell(("abandon", sentence))
        self._leave(LOST)  # agents and servers of this process go with it; nothing accepted is lost

    def refuse(self, sentence: str) -> None:
        """The followers end in order, having told why. Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell(("refuse", sentence))

    def _greet(self, server: Any, own: Hello) -> None:
        connection = accept(server, self.secret.encode(), silence_s=self._config.silence_s)
        if connection is None:
            return
        came = threading.Event()
        found: list[Hello] = []

        def hear(message: Any) -> None:
            if message[0] == "hello":
                found.append(message[1])
                came.set()
            else:
                self._take(follower, message)

        link = Link(
            connection,
            silence_s=self._config.silence_s,
            on_message=hear,
            on_lost=lambda why: self.abandon(f"{follower.hello.name} is lost: {why}; {_ADVICE}"),
        )
        follower = _Follower(hello=own, link=link)
        link.start()
        if not came.wait(self._config.silence_s):
            raise TimeoutError
        follower.hello = found[0]
        self._followers.append(follower)
        if sentence := find_difference(own, follower.hello, time.time()):
            raise PodError(sentence)

    def _send(self, name: str, args: tuple[Any, ...]) -> int:
        with self._changed:
            self._number += 1
            message = pack_message(("order", self._number, name, args))
            late = time.monotonic() + self._config.order_s
            for follower in self._followers:
                follower.open[self._number] = (name, late)
                follower.link.send(message)
            return self._number

    def _take(self, follower: _Follower, message: Any) -> None:
        """What a follower says, in the thread of its link."""
        if message[0] == "stop":
            with self._changed:
                self._asked_to_stop, on_stop = True, self._on_stop
            if on_stop is not None:
                on_stop()
            return
        _, number, value, sentence, asked = message
        with self._changed:
            name, _ = follower.open.pop(number)
            if asked:
                follower.answers[number] = (value, sentence)
                self._changed.notify_all()
        if sentence and not asked:
            self.abandon(f"{follower.hello.name} failed at order {number}, {name}: {sentence}; {_ADVICE}")

    def _watch(self) -> None:
        """Ends the job where an order has not been carried out in time."""
        while not self._ended.wait(_LOOK_S):
            now = time.monotonic()
            with self._changed:
                late = [
                    (follower.hello, number, name)
                    for follower in self._followers
                    for number, (name, until) in follower.open.items()
                    if now > until
                ]
            if late:
                hello, number, name = late[0]
                self.abandon(
                    f"{hello.name} has not done order {number}, {name}, within {self._config.order_s:g} s; {_ADVICE}"
                )

    def _tell(self, message: Any) -> None:
        data = pack_message(message)
        for follower in self._followers:
            follower.link.send(data)
        for follower in self._followers:
            follower.link.close()


_ADVICE = "the run ends here and goes on with --resume once every host is back"


def _say(sentence: str) -> None:
    print(f"train.py: {sentence}", file=sys.stderr, flush=True)
