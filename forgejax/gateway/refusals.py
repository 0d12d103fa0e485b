"""Requests the gateway turns down: one exception, which each wire format words its own way."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that gets an HTTP error. The message says what was given, what was expected and what to do."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def kind(self) -> str:
        """The family of the error, in the words OpenAI's API uses."""
        if self.status == 401:
            return "authentication_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


def refuse_closed_session() -> RefusedError:
    """What every later request of a closed session gets (410)."""
    return RefusedError(410, "this session has ended; nothing more is answered under its key", code="session_closed")


def refuse_field(name: str, given: object, expected: str) -> RefusedError:
    """A field of the body that cannot be understood (400)."""
    shown = repr(given)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    return RefusedError(400, f"{name} is {shown}; expected {expected}", code="invalid_value", param=name)
