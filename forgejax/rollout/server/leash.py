"""A server that another process has started dies with it, however that comes about."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading

_DEATH_SIGNAL = 1  # of prctl(2)


def hold_to_parent(end: asyncio.Event) -> None:
    """Sets ``end``, on the running loop, once this process's stdin is closed: the parent asks so for an orderly end.

    Ctrl-C and SIGTERM are left to the parent, for whoever ends a job tells all its processes at once. Where the parent
    dies, Linux kills this process, even a stopped one; elsewhere the closed stdin ends it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    if os.getppid() != parent:
        os._exit(1)
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            continue
        if not loop.is_closed():
            loop.call_soon_threadsafe(end.set)

    threading.Thread(target=watch, name="leash", daemon=True).start()
