"""Agent processes: each behind a keeper, all of them watched by a guard, ended without leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from forgejax.agents.scaffolds import guard, keeper
from forgejax.errors import AgentError

KEEPER_S = keeper.TERMINATE_S + keeper.SWEEP_S + 1.0  # what a keeper needs at most to end everything
DRAIN_S = 1.0
STDERR_SHOWN = 2000
LOCAL_HOSTS = "127.0.0.1,localhost"


class Guard:
    """Sees to it that agent processes die with this process, ``kill -9`` included. Open one per scaffold."""

    def __init__(self) -> None:
        self.marker = uuid.uuid4().hex
        program = [sys.executable, "-I", "-S", str(Path(guard.__file__)), str(os.getpid()), self.marker]
        self._process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """Kills every process still carrying the marker; at most a few seconds. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def find_program(command: Sequence[str]) -> None:
    """Raises AgentError where the first word of ``command`` is no program that can be started here."""
    if shutil.which(command[0]) is None:
        raise AgentError(
            f'agent command {quote_command(command)}: "{command[0]}" is not an executable file and not on PATH; '
            "install the program or give its full path"
        )


def quote_command(command: Sequence[str]) -> str:
    """The command as people read it in a message."""
    return repr(" ".join(command))


def merge_environment(extra: Mapping[str, str], marker: str, below: Mapping[str, str] | None = None) -> dict[str, str]:
    """``below``, or this process's environment, with ``extra`` over it. A proxy must never stand between an agent and
    the gateway."""
    merged = {**(os.environ if below is None else below), **extra, guard.MARKER_NAME: marker}
    for name in ("NO_PROXY", "no_proxy"):
        merged[name] = ",".join(filter(None, (merged.get(name), LOCAL_HOSTS)))
    return merged


class Child(asyncio.SubprocessProtocol):
    """A running agent process, the leader of a session of its own, as its keeper shows it.

    ``on_output`` is called with each piece of its stdout. The end of its stderr is kept. ``exited`` is set when the
    process itself has ended, and all that it started: not, as asyncio's own ``wait``, when nobody holds its pipes.
    ``cut_off`` tells that it ended because the server that had forked it died.
    """

    def __init__(self, on_output: Callable[[bytes], None]) -> None:
        self._on_output = on_output
        self._stderr = bytearray()
        self._pipes = {1, 2}
        self._drained = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ending: asyncio.Task[None] | None = None
        self.exited = asyncio.Event()
        self.cut_off = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            self._on_output(data)
        else:
            self._stderr += data
            del self._stderr[:-STDERR_SHOWN]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._pipes.discard(fd)
        if not self._pipes:
            self._drained.set()
        if fd == 0:
            self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def process_exited(self) -> None:
        self.exited.set()

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._transport.get_returncode()

    @property
    def stderr_note(self) -> str:
        """How a message quotes the end of its stderr."""
        return describe_stderr(self._stderr.decode("utf-8", errors="replace"))

    async def write(self, data: bytes) -> None:
        """Writes to its stdin and waits until the pipe takes more. What a process that is gone missed is dropped."""
        pipe = self._transport.get_pipe_transport(0)
        assert isinstance(pipe, asyncio.WriteTransport)
        if not pipe.is_closing():
            pipe.write(data)
            await self._writable.wait()

    def close_stdin(self) -> None:
        pipe = self._transport.get_pipe_transport(0)
        assert pipe is not None
        pipe.close()

    async def stop(self) -> None:
        """Ends the process and all that it started: TERM, a moment to tidy up, then KILL; then reads what it had still
        written. Takes at most a few seconds, and goes on by itself where it is cancelled. Idempotent.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    def kill(self) -> None:
        """Kills it and all that it started at once; a keeper that does not do so, a little later."""
        self._signal(signal.SIGUSR1)
        asyncio.get_running_loop().call_later(KEEPER_S, self._signal, signal.SIGKILL)

    async def _end(self) -> None:
        try:
            self._signal(signal.SIGTERM)
            await _within(KEEPER_S, self.exited)
            self._signal(signal.SIGKILL)  # a keeper that cannot do its work
            await _within(DRAIN_S, self.exited)
            await _within(DRAIN_S, self._drained)
        finally:
            self._transport.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self._transport.send_signal(number)


async def _within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def describe_stderr(text: str) -> str:
    """How a message quotes the end of a program's stderr."""
    text = text.strip()
    return f"its stderr ends with:\n{text[-STDERR_SHOWN:]}" if text else "its stderr is empty"


async def spawn(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    directory: Path | None = None,
    stdin: bool,
    on_output: Callable[[bytes], None],
) -> Child:
    """Starts ``command`` behind a keeper, in ``directory`` or where this process is.

    It dies with the thread that calls this, which is the event loop's. Raises AgentError where the system refuses (too
    long an argument, no such directory). A program that is not there ends with a status and says why on its stderr.
    """
    program = [sys.executable, "-I", "-S", str(Path(keeper.__file__)), str(os.getpid()), *command]
    try:
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: Child(on_output),
            *program,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env),
            cwd=directory,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise AgentError(f"agent command {quote_command(command[:1])} cannot be started: {error}") from error
    return child
