"""What the leader of several processes tells the others to do."""

from __future__ import annotations

from typing import Any, Protocol


class Orders(Protocol):
    """To every follower, in one order: what dispatches programs over all devices is told before the leader does it.

    For one thread, the one that dispatches. What each order means is in ``run/pod/follow.py``.
    """

    def give(self, name: str, *args: Any) -> None:
        """Tells the followers and goes on; one that fails at it ends the job."""
        ...

    def ask(self, name: str, *args: Any) -> list[Any]:
        """Tells the followers and waits for their answers, process 1's first. Raises PodError where one fails."""
        ...


class NoFollowers:
    """``Orders`` of a process that is alone."""

    def give(self, name: str, *args: Any) -> None:
        """Nobody is told."""

    def ask(self, name: str, *args: Any) -> list[Any]:
        return []


NOBODY_ELSE = NoFollowers()
