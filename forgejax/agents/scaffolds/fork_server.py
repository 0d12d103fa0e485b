"""Agents forked from a process that has their imports behind it: the trainer's side of ``forker.py``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forgejax.agents.scaffolds import forker
from forgejax.agents.scaffolds.base import AgentConfig
from forgejax.agents.scaffolds.children import Child, merge_environment, quote_command, spawn
from forgejax.environments.scratch import make_scratch, remove_tree
from forgejax.errors import AgentError

ANSWER_S = 15.0  # forking takes milliseconds: a server that needs longer hangs
RESTART_PAUSE_S = 0.1
_WITH_VALUE = ("-W", "-X")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PythonCommand:
    """A command line as Python reads it: the interpreter with its options, and how many words of the command they
    take; what is behind them is the program. ``script`` stands before those where the command names it by PATH.
    """

    interpreter: tuple[str, ...]
    taken: int
    script: str | None = None

    def words(self, command: Sequence[str]) -> list[str]:
        """The program and its arguments, of the command or the same one with its placeholders filled."""
        return [*([] if self.script is None else [self.script]), *command[self.taken :]]


def read_python_command(command: Sequence[str]) -> PythonCommand:
    """How Python reads a command. Raises AgentError for one that starts no Python program of its own."""
    if Path(command[0]).name.startswith("python"):
        taken = 1
        while taken < len(command) and command[taken].startswith("-") and command[taken] not in ("-m", "-c", "-"):
            taken += 2 if command[taken] in _WITH_VALUE else 1
        if taken < len(command) and command[taken] != "-" and (command[taken][0] != "-" or taken + 1 < len(command)):
            return PythonCommand(interpreter=tuple(command[:taken]), taken=taken)
    script = shutil.which(command[0])
    if script is not None:
        with Path(script).open("rb") as file:
            first = file.readline(1024).decode("utf-8", errors="replace")
        words = first.removeprefix("#!").split() if first.startswith("#!") else []
        if words and Path(words[0]).name == "env":
            words = [word for word in words[1:] if word != "-S"]
        if words and Path(words[0]).name.startswith("python"):
            return PythonCommand(interpreter=tuple(words), taken=1, script=script)
    raise AgentError(
        f"agent command {quote_command(command)} starts no Python program, and agent.preload imports modules for one: "
        "expected python and a script, -m or -c, or a script that begins with such a line; or leave agent.preload out"
    )


class ForkServer:
    """One server for all episodes of a scaffold, started again when it dies."""

    def __init__(self, config: AgentConfig, marker: str) -> None:
        self._config, self._marker = config, marker
        self._python = read_python_command(config.command)
        program = self._python.words(config.command)[0]
        self._place = "" if program in ("-m", "-c") else str(Path(program).resolve().parent)
        # What stands for values of an episode is not known yet when the modules are imported.
        known = {name: value for name, value in config.env.items() if "{" not in value}
        self._env = merge_environment(known, marker)
        self._folder = make_scratch("forks")
        self._server: Child | None = None
        self._launching = asyncio.Lock()
        self._deaths = 0  # in a row, without an agent that ended in between
        self._launches = 0
        self.broken: AgentError | None = None

    async def start(self) -> None:
        """Waits until the modules are imported. Raises AgentError with the server's own words where they cannot be."""
        async with self._launching:
            await self._launch()

    async def fork(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        directory: Path | None,
        stdin: bool,
        on_output: Callable[[bytes], None],
    ) -> Child:
        """Starts an agent, as ``children.spawn`` does. Raises AgentError where the server cannot be had."""
        place = Path.cwd() if directory is None else directory
        message = {"words": self._python.words(command), "env": dict(env), "directory": str(place)}
        while True:
            async with self._launching:
                server = await self._see_alive()
            try:
                async with asyncio.timeout(ANSWER_S):
                    return await _connect(self._address, message, Child(on_output), stdin=stdin)
            except (OSError, TimeoutError):  # it is dead, or hangs
                await server.stop()

    def note_result(self) -> None:
        """An agent has ended by itself."""
        self._deaths = 0

    async def close(self) -> None:
        """Ends the server and every agent. Idempotent."""
        if self._server is not None:
            await self._server.stop()
            self._server = None
        remove_tree(self._folder)

    async def _see_alive(self) -> Child:
        """The server, started again where it has died. Raises AgentError once that happened too often in a row."""
        assert self._server is not None
        while self._server.exited.is_set():
            await self._server.stop()
            self._deaths += 1
            error = f"the server that forks agents ended with status {self._server.status}; {self._server.stderr_note}"
            if self._deaths > self._config.max_restarts:
                self.broken = AgentError(
                    f"{error}\nIt ended {self._deaths} times in a row without a result in between."
                )
                raise self.broken
            _log.warning("%s; restart %d of %d", error, self._deaths, self._config.max_restarts)
            await asyncio.sleep(RESTART_PAUSE_S * 2**self._deaths)
            with contextlib.suppress(AgentError):  # the next turn says why
                await self._launch()
        return self._server

    async def _launch(self) -> None:
        self._launches += 1
        self._address = str(self._folder / f"agents{self._launches}")
        command = [*self._python.interpreter, forker.__file__, self._address, self._place, *self._config.preload]
        ready = asyncio.Event()
        server = self._server = await spawn(command, self._env, stdin=False, on_output=lambda _: ready.set())
        waits = [asyncio.create_task(event.wait()) for event in (ready, server.exited)]
        try:
            await asyncio.wait(waits, timeout=self._config.start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not ready.is_set() or server.exited.is_set():
            late = f"was not done within {self._config.start_timeout_s:g} s"
            how = f"ended with status {server.status}" if server.exited.is_set() else late
            await server.stop()
            preload = ", ".join(self._config.preload)
            raise AgentError(f"agent preload of {preload} {how}; {server.stderr_note}")


async def _connect(address: str, message: Mapping[str, object], child: Child, *, stdin: bool) -> Child:
    """Asks the server for an agent, and connects the child with it."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    theirs: list[int] = []
    ours: list[int] = []
    try:
        await loop.sock_connect(connection, address)
        for number in range(3):
            if number == 0 and not stdin:
                theirs.append(os.open(os.devnull, os.O_RDONLY))
                continue
            reader, writer = os.pipe()
            theirs.append(reader if number == 0 else writer)
            ours.append(writer if number == 0 else reader)
        data = json.dumps(message).encode()
        socket.send_fds(connection, [forker.LENGTH.pack(len(data))], theirs)
        await loop.sock_sendall(connection, data)
        if len(await loop.sock_recv(connection, forker.NUMBER.size)) != forker.NUMBER.size:
            raise ConnectionError("the server went away")
    except BaseException:
        for descriptor in ours:
            os.close(descriptor)
        connection.close()
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    transport = _ForkedTransport(child, connection)
    await transport.open_pipes(ours)
    return child


class _Pipe(asyncio.Protocol):
    """One of a child's three pipes; tells the child what asyncio's own subprocesses tell it."""

    def __init__(self, child: Child, number: int) -> None:
        self._child, self._number = child, number
        self.pause_writing, self.resume_writing = child.pause_writing, child.resume_writing  # type: ignore[method-assign]

    def data_received(self, data: bytes) -> None:
        self._child.pipe_data_received(self._number, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._child.pipe_connection_lost(self._number, exc)


class _ForkedTransport(asyncio.SubprocessTransport):
    """A forked agent, seen through its server. What ``children.Child`` needs of a transport, and no more."""

    def __init__(self, child: Child, connection: socket.socket) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._child, self._connection = child, connection
        self._pipes: dict[int, asyncio.BaseTransport] = {}
        self._status: int | None = None
        self._loop.add_reader(connection, self._take_status)
        child.connection_made(self)

    async def open_pipes(self, ours: Sequence[int]) -> None:
        """Takes the ends of its stderr, its stdout and, if there is a third, its stdin."""
        *writers, output, errors = ours
        for number, descriptor in ((1, output), (2, errors)):
            file = os.fdopen(descriptor, "rb", 0)
            self._pipes[number], _ = await self._loop.connect_read_pipe(partial(_Pipe, self._child, number), file)
        for descriptor in writers:
            file = os.fdopen(descriptor, "wb", 0)
            self._pipes[0], _ = await self._loop.connect_write_pipe(partial(_Pipe, self._child, 0), file)

    def get_returncode(self) -> int | None:
        return self._status

    def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None:
        return self._pipes.get(fd)

    def send_signal(self, signal: int) -> None:
        try:
            self._connection.send(bytes([signal]))
        except OSError as error:
            raise ProcessLookupError(f"signal {signal}: the agent has ended") from error

    def close(self) -> None:
        """Lets go of it; where it has not ended the server kills it."""
        self._loop.remove_reader(self._connection)
        self._connection.close()
        for pipe in self._pipes.values():
            pipe.close()

    def _take_status(self) -> None:
        try:
            data = self._connection.recv(forker.NUMBER.size)
        except OSError:
            data = b""
        self._loop.remove_reader(self._connection)
        if len(data) == forker.NUMBER.size:
            self._status = os.waitstatus_to_exitcode(forker.NUMBER.unpack(data)[0])
        else:  # the server has died, and its agents with it
            self._status, self._child.cut_off = -signal.SIGKILL, True
        self._child.process_exited()
