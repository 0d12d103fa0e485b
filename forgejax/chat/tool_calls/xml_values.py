"""Arguments written as text between XML tags, typed by the JSON schema of their tool."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from forgejax.chat.tool_calls.base import CallSpan, MalformedCallError, Signatures, read_json

_PYTHON = {"True": "true", "False": "false", "None": "null"}


def read_function(
    signatures: Signatures, name: str, pairs: Iterable[tuple[str, str]], raw: str, *, python_words: bool
) -> CallSpan:
    """The call of ``name`` with arguments written as text. ``python_words``: True, False and None count as JSON's.

    Raises MalformedCallError.
    """
    arguments: dict[str, Any] = {}
    for key, text in pairs:
        if key in arguments:
            raise MalformedCallError(f"parameter {key} occurs twice")
        schema = signatures.find_schema(name, key)
        try:
            spelled = _PYTHON.get(text.strip(), text) if python_words and _allows_json(schema) else text
            arguments[key] = read_value(spelled, schema)
        except MalformedCallError as error:
            raise MalformedCallError(f"parameter {key}: {error}") from error
    return signatures.check_call(name, arguments, raw)


def read_value(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that ``text`` spells under a JSON schema.

    A string, and a value whose schema names no type, is the text itself; every other type is read as JSON. Where the
    schema also allows a string, text that is none of the other types is one. Raises MalformedCallError.
    """
    types = _read_types(schema)
    others = types - {"string"}
    if not others:
        return text
    try:
        value = read_json(text)
    except MalformedCallError:
        if "string" in types:
            return text
        raise
    if any(_is_of(value, kind) for kind in others):
        return value
    if "string" in types:
        return text
    raise MalformedCallError(f"{text.strip()[:80]!r} is not of type {' or '.join(sorted(others))}")


def scan_all(pattern: re.Pattern[str], text: str, what: str) -> list[re.Match[str]]:
    """Every match of ``pattern`` one after the other, with nothing but white space between. Raises MalformedCallError.

    ``pattern`` takes the white space before a match itself.
    """
    found, at = [], 0
    while match := pattern.match(text, at):
        found.append(match)
        at = match.end()
    if text[at:].strip():
        raise MalformedCallError(f"expected {what}, found {text[at:].strip()[:80]!r}")
    return found


def _allows_json(schema: Mapping[str, Any]) -> bool:
    return bool(_read_types(schema) - {"string"})


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
