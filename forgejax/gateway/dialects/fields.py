"""Typed reading of JSON bodies: a wrong type is a 400 that names the field, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgejax.gateway.refusals import refuse_field


def read_integer(
    body: Mapping[str, Any], name: str, *, least: int | None = None, most: int | None = None, default: int | None = None
) -> int | None:
    """An integer in [least, most]; null and absence give ``default``. An integral float counts."""
    value = body.get(name)
    if value is None:
        return default
    bounds = "" if least is None else f" of at least {least}"
    bounds += "" if most is None else f" and at most {most}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise refuse_field(name, value, f"an integer{bounds}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise refuse_field(name, value, f"an integer{bounds}")
    return value


def read_number(body: Mapping[str, Any], name: str, *, least: float, most: float, default: float) -> float:
    """A number in [least, most]; null and absence give ``default``."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise refuse_field(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def read_boolean(body: Mapping[str, Any], name: str) -> bool:
    """A boolean; null and absence are false."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise refuse_field(name, value, "true or false")
    return value


def read_mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise refuse_field(name, value, "an object")
    return value


def read_text(value: object, name: str) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise refuse_field(name, value, "a non-empty string")
    return value


def read_array(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise refuse_field(name, value, "an array")
    return value
