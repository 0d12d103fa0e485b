"""The windowed FIFO as a pure state machine: no I/O, no threads, no clocks.

Indices 0, 1, 2, ... are dispatched in order. A live group is WAITING (dispatched by a run that ended, to be dispatched
again), RUNNING, FINISHED or TAKEN; dropped, failed and retired groups are gone. The head is the oldest index not yet
taken, dropped or failed. With N = ``in_flight``, P = ``groups_per_step``, W = ``width``:

- a group may be dispatched iff fewer than N live groups are older than it. For a new index that is "dispatched minus
  retired stays at N"; for groups returned by a resume it keeps the bounds below without discarding any of them;
- the oldest finished group with index in [head, head + W - 1] may be taken; the head moves on at that moment;
- taken groups stay live until retired, so a prefetched batch counts as in flight;
- disorder = index - head when taken <= W - 1; lag = groups taken (dropped ones are taken first) between a group's
  dispatch and its own taking <= N + W - 2; staleness <= floor((N + W - 2) / P) if the refill is dispatched on the
  weights just published. A batch that goes out short, for drops in a row, can add 1.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from forgejax.errors import ConfigError, PoolError


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """``window``: a width W in 1..N, 0 for the default max(1, floor(0.3 N)), or -1 for greedy (no bound is claimed)."""

    in_flight: int = 16
    groups_per_step: int = 4
    window: int = 0

    def __post_init__(self) -> None:
        if self.groups_per_step < 1:
            raise ConfigError(f"groups_per_step is {self.groups_per_step}; expected at least 1")
        if self.in_flight < self.groups_per_step:
            raise ConfigError(
                f"in_flight is {self.in_flight}, below groups_per_step {self.groups_per_step}: a batch could never "
                "fill; raise in_flight (2 * groups_per_step lets rollouts and training overlap) or lower it"
            )
        if not -1 <= self.window <= self.in_flight:
            raise ConfigError(
                f"window is {self.window}; expected 1 to in_flight ({self.in_flight}), "
                "0 for the default or -1 for greedy"
            )

    @property
    def width(self) -> int | None:
        """W, or None when greedy."""
        if self.window == 0:
            return max(1, self.in_flight * 3 // 10)
        return None if self.window == -1 else self.window

    @property
    def max_disorder(self) -> int | None:
        return None if self.width is None else self.width - 1

    @property
    def max_lag(self) -> int | None:
        return None if self.width is None else self.in_flight + self.width - 2

    @property
    def max_staleness(self) -> int | None:
        return None if self.max_lag is None else self.max_lag // self.groups_per_step


class State(enum.StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    TAKEN = "taken"


@dataclass(frozen=True, kw_only=True)
class Live:
    """A live group. ``taken_before``: groups taken when it was dispatched."""

    index: int
    state: State
    taken_before: int = 0


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Where a group stood when it was taken."""

    index: int
    disorder: int
    lag: int


class Window:
    """The state machine. Every method raises PoolError, and changes nothing, when its law forbids the move.

    ``live``, ``next_index`` and ``taken`` (groups taken so far) restore an earlier one.
    """

    def __init__(self, config: WindowConfig, *, live: Iterable[Live] = (), next_index: int = 0, taken: int = 0) -> None:
        self._config = config
        self._live = {group.index: group for group in sorted(live, key=lambda group: group.index)}
        self._next = next_index
        self._taken = taken
        # Groups returned by a resume may exceed N; they only become fewer, as no new index is dispatched meanwhile.
        self._most_live = max(config.in_flight, len(self._live))

    @property
    def head(self) -> int:
        """The oldest index not yet taken, dropped or failed; the next new index if there is none."""
        return next((i for i, group in self._live.items() if group.state is not State.TAKEN), self._next)

    @property
    def next_index(self) -> int:
        return self._next

    @property
    def taken(self) -> int:
        return self._taken

    def count(self, state: State) -> int:
        return sum(group.state is state for group in self._live.values())

    def state(self, index: int) -> State | None:
        """The state of a live group; None for an index that is gone or was never dispatched."""
        group = self._live.get(index)
        return None if group is None else group.state

    def dispatchable(self) -> int | None:
        """The index that may be dispatched now, the oldest first, or None while the window is full."""
        for older, (index, group) in enumerate(self._live.items()):
            if older >= self._config.in_flight:
                return None
            if group.state is State.WAITING:
                return index
        return self._next if len(self._live) < self._config.in_flight else None

    def dispatch(self, index: int) -> None:
        if index != self.dispatchable():
            raise PoolError(f"group {index} may not be dispatched now; expected {self.dispatchable()}")
        self._live[index] = Live(index=index, state=State.RUNNING, taken_before=self._taken)
        self._next = max(self._next, index + 1)

    def finish(self, index: int) -> None:
        self._move(index, State.RUNNING, State.FINISHED, "finished")

    def fail(self, index: int) -> None:
        self._require(index, State.RUNNING, "failed")
        del self._live[index]

    def give_back(self, index: int) -> None:
        """A running group that was cut off: it is to be dispatched again."""
        self._move(index, State.RUNNING, State.WAITING, "given back")

    def takeable(self) -> int | None:
        """The oldest finished group inside the window, or None."""
        head, width = self.head, self._config.width
        for index, group in self._live.items():
            if width is not None and index >= head + width:
                return None
            if group.state is State.FINISHED:
                return index
        return None

    def take(self) -> Taken:
        index = self.takeable()
        if index is None:
            raise PoolError(f"no group may be taken: none is finished within the window that starts at {self.head}")
        place = Taken(index=index, disorder=index - self.head, lag=self._taken - self._live[index].taken_before)
        self._move(index, State.FINISHED, State.TAKEN, "taken")
        self._taken += 1
        return place

    def drop(self, index: int) -> None:
        """A taken group that no batch wants: it retires at once."""
        self.retire(index)

    def retire(self, index: int) -> None:
        """A taken group whose step has ended and whose weights are published."""
        self._require(index, State.TAKEN, "retired")
        del self._live[index]

    def waits_on_trainer(self) -> bool:
        """Whether nothing can come from the rollouts until a taken batch retires."""
        return self.dispatchable() is None and all(group.state is State.TAKEN for group in self._live.values())

    def check_integrity(self) -> None:
        """Raises PoolError if a law that holds between any two moves is broken."""
        indices = list(self._live)
        if indices != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < self._next):
            raise PoolError(f"live groups {indices} are not in order below the next index {self._next}")
        if len(indices) > self._most_live:
            raise PoolError(f"{len(indices)} groups are live; at most {self._most_live} may be")
        if self.count(State.TAKEN) > self._taken:
            raise PoolError(f"{self.count(State.TAKEN)} groups are taken but only {self._taken} takings were counted")
        if not indices and self.dispatchable() is None:
            raise PoolError("no group is live and none may be dispatched: the window has come to a standstill")

    def _move(self, index: int, expected: State, to: State, verb: str) -> None:
        group = self._require(index, expected, verb)
        self._live[index] = Live(index=index, state=to, taken_before=group.taken_before)

    def _require(self, index: int, expected: State, verb: str) -> Live:
        group = self._live.get(index)
        if group is None or group.state is not expected:
            raise PoolError(
                f"group {index} cannot be {verb}: it is {'gone' if group is None else group.state}, expected {expected}"
            )
        return group
