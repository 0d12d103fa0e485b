"""Arguments written as text between XML tags, typed by the JSON schema of their tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgejax.chat.tool_calls.base import MalformedCallError, read_json

_PYTHON = {"True": "true", "False": "false", "None": "null"}


def read_value(text: str, schema: Mapping[str, Any], *, python_words: bool) -> Any:
    """The value that ``text`` spells under a JSON schema.

    A string, and a value whose schema names no type, is the text itself; every other type is read as JSON. Where the
    schema also allows a string, text that is none of the other types is one. ``python_words``: True, False and None
    count as JSON's. Raises MalformedCallError.
    """
    types = _read_types(schema)
    others = types - {"string"}
    if not others:
        return text
    try:
        value = read_json(_PYTHON.get(text.strip(), text) if python_words else text)
    except MalformedCallError:
        if "string" in types:
            return text
        raise
    if any(_is_of(value, kind) for kind in others):
        return value
    if "string" in types:
        return text
    raise MalformedCallError(f"{text.strip()[:80]!r} is not of type {' or '.join(sorted(others))}")


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether every text is a value of its own, so that it need not be complete to be handed over."""
    return not _read_types(schema) - {"string"}


def _read_types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types a schema allows; empty where it does not say."""
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset({given})
    if isinstance(given, list):
        return frozenset(kind for kind in given if isinstance(kind, str))
    branches = schema.get("anyOf") or schema.get("oneOf") or ()
    if not isinstance(branches, list):
        return frozenset()
    each = [_read_types(branch) if isinstance(branch, Mapping) else frozenset[str]() for branch in branches]
    return frozenset[str]().union(*each) if all(each) else frozenset()


def _is_of(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or float(value).is_integer())
    python = {"boolean": bool, "object": dict, "array": list, "null": type(None)}.get(kind)
    return python is not None and isinstance(value, python)
