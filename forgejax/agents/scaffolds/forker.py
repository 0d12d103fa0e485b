"""A tiny server that has an agent's imports behind it and forks an agent for every episode.

Run by the agent's own interpreter as ``python forker.py SOCKET DIRECTORY MODULES...``. It puts ``DIRECTORY`` where the
interpreter puts a script's own, imports the modules, listens at ``SOCKET`` and prints a line that says so. A connection
is an episode: four bytes with the length of a JSON object ``{"words", "env", "directory"}`` and, beside them, the
descriptors for stdin, stdout and stderr. Bytes that follow are signals for the keeper; the end of the connection kills
it. The answers are four bytes each: the keeper's process id, and its wait status once it has ended.

The program runs as it does when it is started: as ``__main__``, with its own arguments, environment, directory and
random numbers. What is different is that the modules are imported already, with the environment of this server.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types

MESSAGE_S = 5.0
READY = "ready"
LENGTH = struct.Struct("!I")
NUMBER = struct.Struct("!i")


def load_keeper() -> types.ModuleType:
    """The module beside this one, which an agent's interpreter cannot import by its name."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")  # noqa: PTH100, PTH118, PTH120
    spec = importlib.util.spec_from_file_location("forgejax_keeper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_modules(names: list[str]) -> None:
    """Imports them. Ends the process with a sentence for one that cannot be imported, and for one that starts threads:
    a fork has only the thread that forked it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise SystemExit(f"agent preload: {name} cannot be imported: {type(error).__name__}: {error}") from error
        others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        if others:
            raise SystemExit(f"agent preload: importing {name} starts threads ({', '.join(others)}); leave it out")
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page


class Server:
    """The connections, each with the keeper of its agent."""

    def __init__(self, path: str, keeper: types.ModuleType) -> None:
        self._keeper = keeper
        self._signals = keeper.Signals((signal.SIGCHLD,))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(socket.SOMAXCONN)
        self._keepers: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._signals.came, selectors.EVENT_READ)

    def serve(self) -> list[str]:
        """Forks agents for ever; returns only in an agent, with the words of its program."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    words = self._accept()
                    if words is not None:
                        return words
                elif key.fileobj == self._signals.came:
                    self._signals.wait(0.0)
                    self._report()
                elif key.fileobj in self._keepers:
                    self._hear(key.fileobj)

    def _accept(self) -> list[str] | None:
        """Begins an episode; the program's words in its agent, None here."""
        connection, _ = self._listener.accept()
        connection.settimeout(MESSAGE_S)
        descriptors: list[int] = []
        try:
            head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
            message = json.loads(receive(connection, LENGTH.unpack(head)[0]))
        except (OSError, ValueError, struct.error):
            connection.close()
        else:
            server = os.getpid()
            keeper = os.fork()
            if keeper == 0:
                self._leave(descriptors)
                connection.close()
                self._keeper.keep(server)
                return take_place(message)
            with contextlib.suppress(OSError):  # who asked has gone away, which is heard of next
                connection.sendall(NUMBER.pack(keeper))
            self._keepers[connection] = keeper
            self._selector.register(connection, selectors.EVENT_READ)
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _leave(self, descriptors: list[int]) -> None:
        """In a forked process: lets go of everything of the server's, and takes the agent's own descriptors."""
        self._signals.forget()
        self._selector.close()
        self._listener.close()
        for connection in self._keepers:
            connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)

    def _hear(self, connection: socket.socket) -> None:
        """Passes signals on; who has gone away wants the agent ended."""
        try:
            numbers = connection.recv(64)
        except OSError:
            numbers = b""
        for number in numbers or (signal.SIGUSR1,):
            os.kill(self._keepers[connection], number)  # not reaped yet, so that it is nobody else
        if not numbers:
            self._selector.unregister(connection)

    def _report(self) -> None:
        """Tells of the keepers that have ended."""
        ends: dict[int, int] = {}
        self._keeper.reap(ends)
        for connection in [each for each, keeper in self._keepers.items() if keeper in ends]:
            with contextlib.suppress(OSError):  # nobody wants to know
                connection.sendall(NUMBER.pack(ends[self._keepers.pop(connection)]))
            if connection in self._selector.get_map():
                self._selector.unregister(connection)
            connection.close()


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes. Raises OSError where they do not come."""
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the message ends early")
        data += piece
    return bytes(data)


def take_place(message: dict[str, object]) -> list[str]:
    """Gives this forked process the agent's environment, directory and random numbers; returns its words."""
    words, env, directory = message["words"], message["env"], message["directory"]
    assert isinstance(words, list) and isinstance(env, dict) and isinstance(directory, str)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    return words


def run_program(words: list[str]) -> None:
    """Runs a Python program as the interpreter does with these words."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    if words[0] == "-c":
        sys.argv, source, path = ["-c", *words[2:]], words[1].encode(), "<string>"
    else:
        sys.argv, path = words, words[0]
        with open(path, "rb") as file:  # noqa: PTH123
            source = file.read()
    main = types.ModuleType("__main__")
    if words[0] != "-c":
        main.__file__ = path
    sys.modules["__main__"] = main
    exec(compile(source, path, "exec"), main.__dict__)


def fork_agents(path: str, directory: str, modules: list[str]) -> None:
    """Serves; in each agent, runs its program."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = directory
    keeper = load_keeper()
    import_modules(modules)
    server = Server(path, keeper)
    print(READY, flush=True)
    run_program(server.serve())


if __name__ == "__main__":
    fork_agents(sys.argv[1], sys.argv[2], sys.argv[3:])
