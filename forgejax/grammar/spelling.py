"""A grammar in the words of llguidance, the library that makes the masks: Lark rules around its ``%json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from forgejax.types import Grammar

_SPACE = r"[ \n\r\t]{0,32}"  # without a bound, a policy that likes white space would write nothing else
_FREE = "/(?s:.*)/"


def spell_lark(grammar: Grammar, schema: Mapping[str, Any]) -> str:
    """The grammar as Lark text; ``schema`` is its schema, read.

    Nothing is forced: where only one text can follow, every way to cut it into tokens is allowed, for the policy is to
    spell it as it likes.
    """
    rules = ['%llguidance {"no_forcing": true}']
    start = "space (json | free)" if grammar.free_openings else "space json"
    if grammar.thought_closing:
        optional = bool(grammar.thought_opening)
        opening = f"{json.dumps(grammar.thought_opening)} " if optional else ""
        start = f"{'(space thought)?' if optional else 'thought'} {start}"
        rules += [f"thought: {opening}thinking", f"thinking[suffix={json.dumps(grammar.thought_closing)}]: {_FREE}"]
    if grammar.free_openings:
        openings = " | ".join(json.dumps(opening) for opening in grammar.free_openings)
        rules += [f"free: ({openings}) rest", f"rest: {_FREE}"]
    # Whatever the agent put there, these are ours: its options could loosen the masks.
    ours = {**schema, "x-guidance": {"whitespace_pattern": _SPACE}}
    rules += [f"space: /{_SPACE}/", f"start: {start}", f"json: %json {json.dumps(ours)}"]
    return "\n".join(rules)
