"""JSON schemas as they come from agents: bounded before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from forgejax.errors import GrammarError

MAX_SCHEMA_BYTES = 65_536
_MAX_DEPTH = 100
_MAX_MULTIPLE = 10_000  # the automaton of "divisible by n" has n states


def read_schema(text: str) -> dict[str, Any]:
    """The schema. Raises GrammarError for one that is no JSON object, or too large to be served in bounded time."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are served: make it smaller")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}; send a JSON schema") from error
    if not isinstance(schema, dict):
        raise GrammarError(f"the schema is a JSON {type(schema).__name__}; expected an object")
    multiple = math.lcm(*_walk(schema))
    if multiple > _MAX_MULTIPLE:
        raise GrammarError(
            f"the schema's multipleOf come together only every {multiple}; at most {_MAX_MULTIPLE} can be served: "
            "leave them out, or choose rounder ones"
        )
    return schema


def _walk(schema: dict[str, Any]) -> Iterator[int]:
    """The digits of every multipleOf, without the powers of ten; wherever the word stands, for that errs on the side of
    refusing. Raises GrammarError for a schema that is nested too deeply, or has numbers that would be others."""
    found: list[tuple[Any, int]] = [(schema, 1)]
    while found:
        value, depth = found.pop()
        if depth > _MAX_DEPTH:
            raise GrammarError(f"the schema is nested more than {_MAX_DEPTH} deep; make it flatter, with $defs")
        if isinstance(value, int) and not _is_double(value):
            raise GrammarError(f"the schema has the number {str(value)[:30]}, which no double holds; give one nearby")
        if isinstance(value, list):
            found += [(item, depth + 1) for item in value]
        elif isinstance(value, dict):
            found += [(item, depth + 1) for item in value.values()]
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float) and not isinstance(multiple, bool) and math.isfinite(multiple):
                yield int("".join(map(str, Decimal(str(abs(multiple))).normalize().as_tuple().digits))) or 1


def _is_double(value: int) -> bool:
    """Whether a double holds it: the masks are made with doubles."""
    return value.bit_length() < 1024 and int(float(value)) == value
