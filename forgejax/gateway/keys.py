"""Keys of sessions: how they are made, where an address may hold one, and how none gets into a log."""

from __future__ import annotations

import logging
import re
import secrets

KEYED = "/key/{key}"
"""What may go before a path, for programs that can be given an address and no key."""

_KEY = re.compile(r"fjx-[\w-]+")
_HIDDEN = "fjx-..."


def make_key() -> str:
    """A new key, which nobody can guess."""
    return f"fjx-{secrets.token_urlsafe(24)}"


def hide_keys(text: str) -> str:
    """``text`` with every key in it unreadable."""
    return _KEY.sub(_HIDDEN, text)


def get_logger(name: str) -> logging.Logger:
    """A logger that writes no key."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, KeyHider) for each in logger.filters):
        logger.addFilter(KeyHider())
    return logger


class KeyHider(logging.Filter):
    """Hides keys in what a logger writes, tracebacks included. It changes every record of its logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_keys(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = hide_keys(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True
