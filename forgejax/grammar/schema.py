"""JSON schemas as they come from agents: bounded before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Context, Decimal
from typing import Any, NoReturn, TypeGuard

from forgejax.errors import GrammarError

MAX_SCHEMA_BYTES = 65_536
_MAX_DEPTH = 100
# Numbers that the library reads as they are: it computes digits x 10^power in doubles, of which one is rounded then.
_MAX_DIGITS, _MAX_POWER = 2**53, 22
_EXACT = Context(prec=5_000)
_MAX_MULTIPLE = 10_000  # the automaton of "divisible by n" has n states


def read_schema(text: str) -> dict[str, Any]:
    """The schema. Raises GrammarError for one that is no JSON object, or too large to be served in bounded time."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are served: make it smaller")
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
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


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _walk(schema: dict[str, Any]) -> Iterator[int]:
    """The digits of every multipleOf, without the powers of ten; wherever the word stands, for that errs on the side of
    refusing. Raises GrammarError for a schema that is nested too deeply, or has numbers that would become others."""
    found: list[tuple[Any, int]] = [(schema, 1)]
    while found:
        value, depth = found.pop()
        if depth > _MAX_DEPTH:
            raise GrammarError(f"the schema is nested more than {_MAX_DEPTH} deep; make it flatter, with $defs")
        if isinstance(value, list):
            found += [(item, depth + 1) for item in value]
        elif isinstance(value, dict):
            found += [(item, depth + 1) for item in value.values()]
            if _is_number(multiple := value.get("multipleOf")):
                yield _split_number(multiple)[0] or 1
        elif _is_number(value):
            digits, power = _split_number(value)
            if digits > _MAX_DIGITS or abs(power) > _MAX_POWER:
                raise GrammarError(
                    f"the schema's number {str(value)[:30]} has too many digits to be met; give it fewer"
                )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _split_number(value: float) -> tuple[int, int]:
    """The number, without its sign, as digits and a power of ten; more than can be met of one that became infinite."""
    if value in (math.inf, -math.inf):
        return _MAX_DIGITS + 1, 0
    _, digits, power = Decimal(str(value)).normalize(_EXACT).as_tuple()
    return int("".join(map(str, digits))), int(power)
