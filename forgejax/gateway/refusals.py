"""Requests the gateway turns down: one exception, which each wire format words its own way."""

from __future__ import annotations

OVERLOADED = "overloaded"
"""The code of refusals for too much at once, by all sessions together."""


class RefusedError(Exception):
    """A request that gets an HTTP error. The message says what was given, what was expected and what to do.

    ``retry_after_s`` is when to come again, where that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """The family of the error, in the words OpenAI's API uses."""
        known = {401: "authentication_error", 429: "rate_limit_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


class OverflowRefusedError(RefusedError):
    """A prompt that leaves no room to answer (400). Agents know it by its words, which differ between vendors."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            400,
            f"This model's maximum context length is {context_length} tokens. However, your messages resulted in "
            f"{prompt_tokens} tokens, which leaves no room to answer. Please reduce the length of the messages.",
            code="context_length_exceeded",
            param="messages",
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


def refuse_closed_session() -> RefusedError:
    """What every later request of a closed session gets (410)."""
    return RefusedError(410, "this session has ended; nothing more is answered under its key", code="session_closed")


def refuse_late_session() -> RefusedError:
    """What every request gets once its session's deadline has passed (410)."""
    return RefusedError(410, "this session's deadline has passed; nothing more is answered", code="session_expired")


def refuse_overloaded(who: str, retry_after_s: float) -> RefusedError:
    """More is asked than can be answered at once (503, or what a dialect's agents know for it)."""
    return RefusedError(
        503, f"{who} is overloaded. Please try again later.", code=OVERLOADED, retry_after_s=retry_after_s
    )


def refuse_field(name: str, given: object, expected: str) -> RefusedError:
    """A field of the body that cannot be understood (400)."""
    shown = repr(given)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    return RefusedError(400, f"{name} is {shown}; expected {expected}", code="invalid_value", param=name)
