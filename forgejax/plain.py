"""Plain data into dataclasses, strictly: what is unknown or of another type is an error that names its place."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from forgejax.errors import ConfigError

_T = TypeVar("_T")


def from_mapping(cls: type[_T], given: Mapping[str, Any], source: str) -> _T:
    """A dataclass from plain data; unknown keys and wrong types are errors that name their place."""
    _refuse_unknown(cls, given, source, "")
    try:
        return msgspec.convert(given, cls, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain_mismatch(cls, given, str(error))}") from error


def suggest_name(name: str, known: Iterable[str]) -> str:
    """How an error goes on about a name that is not known: with the nearest one, or all there are."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"


def _explain_mismatch(cls: Any, given: Any, problem: str) -> str:
    """What msgspec says of a value, as that value and what to write in its place."""
    said, _, place = problem.partition(" - at `$")
    where, kind, value = place.rstrip("`").lstrip("."), cls, given
    if not where or "..." in where:  # of a table of free keys msgspec does not tell the key
        return f"a value in {where.partition('[...]')[0]}: {said}" if where else said
    for name, number in re.findall(r"\.(\w+)|\[(\d+)\]", place):
        kinds = [kind, *typing.get_args(kind)]
        if name:
            kind = typing.get_type_hints(next(filter(dataclasses.is_dataclass, kinds)))[name]
            value = value[name]
        else:
            kind = typing.get_args(next(each for each in kinds if typing.get_origin(each) in (tuple, list)))[0]
            value = value[int(number)]
    form = _describe_kind(kind)
    return f"{where} is {value!r}; expected {form}" if form else f"{where} is {value!r}: {said}"


def _describe_kind(kind: Any) -> str:
    """What a value of this type looks like in a TOML file; "" where it has no simple form."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of: {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, map(_describe_kind, arguments)))
    if origin is tuple or origin is list:
        return f"a list in brackets, each of them {_describe_kind(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a section, with keys of its own"
    forms = {int: "a whole number, without quotes", float: "a number, without quotes", str: "text in quotes"}
    return (forms | {bool: "true or false, without quotes"}).get(kind, "")


def _refuse_unknown(cls: Any, given: Any, source: str, place: str) -> None:
    """Walks the nested dataclasses beside the data."""
    for argument in typing.get_args(cls):
        if isinstance(given, list | tuple):
            for number, item in enumerate(given):
                _refuse_unknown(argument, item, source, f"{place}[{number}]")
        elif typing.get_origin(cls) in (typing.Union, types.UnionType, Annotated):
            _refuse_unknown(argument, given, source, place)
    if not (dataclasses.is_dataclass(cls) and isinstance(given, Mapping)):
        return
    hints = typing.get_type_hints(cls)
    known = {each.name: hints[each.name] for each in dataclasses.fields(cls)}
    for key, value in given.items():
        where = f"{place}.{key}".lstrip(".")
        if key not in known:
            raise ConfigError(f"{source}: unknown key {where!r}; {suggest_name(key, known)}")
        _refuse_unknown(known[key], value, source, where)
