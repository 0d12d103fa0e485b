"""Runs inside a sandbox before its program does; the standard library's own modules only.

Where the sandbox has an egress, it opens the port that the program will call, in the sandbox's own network, and hands
the listening socket out through a Unix socket: who holds it outside answers, and no other address can be reached. Then
it lowers what it may do and becomes the program.
"""

import json
import os
import resource
import socket
import sys


def open_egress(path: str, port: int) -> None:
    """Hands out a socket that listens at ``port``; the answer is a byte once somebody accepts there."""
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as door:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(128)
        door.settimeout(30.0)
        door.connect(path)
        socket.send_fds(door, [b"\0"], [listening.fileno()])
        if door.recv(1) != b"\0":
            raise ConnectionError("nobody takes the egress of the sandbox")


def lower(user: int | None, limits: dict[str, int]) -> None:
    """Becomes ``user``, without groups, where one is given; sets limits that are names of ``resource``."""
    for name, most in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def enter() -> None:
    told = json.loads(sys.argv[1])
    command = sys.argv[2:]
    try:
        if told["port"] is not None:
            open_egress(told["door"], told["port"])
        lower(told["user"], told["limits"])
    except (OSError, ValueError) as error:
        sys.exit(f"the sandbox could not be entered: {error}")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    enter()
