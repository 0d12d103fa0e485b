"""A tiny program between the trainer and one agent process: with the agent ends all that the agent has started.

Run as ``python -I -S keeper.py TRAINER_PID COMMAND...``, or called where an agent is forked (``forker.py``). It adopts
what the agent leaves behind (Linux calls it a subreaper), so nothing escapes it into a session, a process group or an
environment of its own. SIGTERM: the agent's group is asked to end, and everything is killed a moment later. SIGUSR1, or
the trainer's death, however that comes about: everything is killed at once. It ends as the agent did, with its status
or by its signal. If the keeper itself is killed, the agent dies with it, and the guard ends the rest. Elsewhere than on
Linux the agent's group is all it ends.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time

TERMINATE_S = 1.0
SWEEP_S = 3.0
PAUSE_S = 0.01
NOT_STARTED = 127
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)
_AT_ONCE = signal.SIGUSR1
_WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, _AT_ONCE)


def keep(parent: int) -> None:
    """Makes this process a keeper, and ends it as its agent ends: it returns in the agent alone, a new process.

    ``parent`` is the process whose death ends the keeper.
    """
    signals = Signals(_WATCHED)
    set_process_option(_SUBREAPER, 1)
    set_process_option(_DEATH_SIGNAL, _AT_ONCE)
    if os.getppid() != parent:
        os._exit(NOT_STARTED)
    agent = fork_agent(signals)
    if agent == 0:
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # the pipes are the agent's alone
        os.dup2(nothing, descriptor)
    os.chdir("/")
    ends = {agent: watch(agent, signals)}
    end_descendants(agent, ends, signals)
    end_as(ends[agent])


class Signals:
    """Some of the signals that this process gets, as something to wait for. ``came`` is readable once there are any."""

    def __init__(self, watched: tuple[signal.Signals, ...]) -> None:
        self._watched = watched
        self.came, self._woken = os.pipe()
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._woken)
        for number in watched:
            signal.signal(number, lambda number, frame: None)

    def wait(self, seconds: float | None) -> set[int]:
        """Those that came; none where ``seconds`` are over before."""
        readable, _, _ = select.select([self.came], [], [], seconds)
        return set(os.read(self.came, 4096)) if readable else set()

    def forget(self) -> None:
        """In a forked process: its signals are its own again, as the system has them."""
        signal.set_wakeup_fd(-1)
        for number in self._watched:
            signal.signal(number, signal.SIG_DFL)
        os.close(self.came)
        os.close(self._woken)


def set_process_option(option: int, value: int) -> None:
    """A call of prctl(2), where the system has it."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def fork_agent(signals: Signals) -> int:
    """The id of the agent, the leader of a session of its own, which dies with this process; in the agent, 0."""
    keeper = os.getpid()
    agent = os.fork()
    if agent == 0:
        os.setsid()
        signals.forget()
        set_process_option(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(NOT_STARTED)
    return agent


def become(command: list[str]) -> None:
    """Puts the command in this process's place; where it cannot be started, says so and ends the process."""
    try:
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error}\n".encode())
    finally:
        os._exit(NOT_STARTED)


def watch(agent: int, signals: Signals) -> int | None:
    """Waits until the agent has ended, gives how; None where it is to be killed."""
    kill_at: float | None = None
    while True:
        came = signals.wait(None if kill_at is None else max(0.0, kill_at - time.monotonic()))
        if _AT_ONCE in came or (kill_at is not None and time.monotonic() >= kill_at):
            return None
        if signal.SIGTERM in came and kill_at is None:
            kill_at = time.monotonic() + TERMINATE_S
            signal_group(agent, signal.SIGTERM)
        ends: dict[int, int | None] = {}
        reap(ends)
        if agent in ends:
            return ends[agent]


def reap(ends: dict[int, int | None]) -> bool:
    """Enters how children have ended; whether there are any left."""
    while True:
        try:
            process_id, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if process_id == 0:
            return True
        ends[process_id] = status


def end_descendants(agent: int, ends: dict[int, int | None], signals: Signals) -> None:
    """Kills what is left of the agent, again and again, for some may be forking; who loses a parent is adopted here."""
    until = time.monotonic() + SWEEP_S
    signal_group(agent, signal.SIGKILL)
    while reap(ends) and time.monotonic() < until:
        for process_id in find_descendants(os.getpid()):
            try:
                os.kill(process_id, signal.SIGKILL)
            except OSError:
                continue
        signals.wait(PAUSE_S)


def find_descendants(ancestor: int) -> list[int]:
    """The ids of all processes below this one, by /proc; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    names = os.listdir("/proc") if os.path.isdir("/proc") else []  # noqa: PTH112, PTH208 (pathlib doubles the start-up)
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:  # noqa: PTH123
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(parent, []).append(int(name))
    found, below = [], [ancestor]
    while below:
        below = [child for process_id in below for child in children.get(process_id, ())]
        found += below
    return found


def signal_group(leader: int, number: int) -> None:
    try:
        os.killpg(leader, number)
    except OSError:
        return  # nobody of it is left


def end_as(status: int | None) -> None:
    """Ends this process as one of that wait status has ended."""
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(NOT_STARTED if status is None else os.WEXITSTATUS(status))


if __name__ == "__main__":
    keep(int(sys.argv[1]))
    become(sys.argv[2:])
