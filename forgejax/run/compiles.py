"""How many programs were compiled: one for each new shape, and none for each new input, if all is well."""

from __future__ import annotations

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Counts the programs that jax compiles in this process, in any thread, until it is closed.

    A program that is loaded from the persistent compilation cache counts as well.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        with self._lock:
            self.count += event == _EVENT
