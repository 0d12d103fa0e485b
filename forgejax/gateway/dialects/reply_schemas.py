"""The JSON schema that a reply is to follow, as each vendor's API asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from forgejax.chat.messages import ReplySchema
from forgejax.gateway.dialects.fields import read_mapping, spell_json
from forgejax.gateway.refusals import refuse_field

_ANY_OBJECT = {"type": "object"}


def read_reply_format(value: object, name: str, *, inside: str | None = None) -> ReplySchema | None:
    """Of ``{"type": "text" | "json_object" | "json_schema", ...}``; the schema lies in ``schema``, or in that of the
    object called ``inside``. It holds, ``strict`` or not. Raises RefusedError."""
    if value is None:
        return None
    fields = read_mapping(value, name)
    kind = fields.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _take(_ANY_OBJECT, name)
    if kind != "json_schema":
        raise refuse_field(f"{name}.type", kind, "one of text, json_object, json_schema")
    if inside is not None:
        fields, name = read_mapping(fields.get(inside), f"{name}.{inside}"), f"{name}.{inside}"
    return _take(fields.get("schema"), f"{name}.schema")


def read_guided_json(value: object) -> ReplySchema | None:
    """vLLM's ``guided_json``: a schema, or the text of one. Raises RefusedError."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise refuse_field("guided_json", value, f"a JSON schema ({error})") from error
    return _take(value, "guided_json")


def choose_schema(asked: Sequence[ReplySchema | None]) -> ReplySchema | None:
    """The one schema that was asked for. Raises RefusedError where two fields ask for different ones."""
    found = [schema for schema in asked if schema is not None]
    if any(schema.text != found[0].text for schema in found):
        raise refuse_field(found[1].field, "another schema", f"none beside {found[0].field}, or the same one")
    return found[0] if found else None


def _take(schema: object, name: str) -> ReplySchema:
    if not isinstance(schema, dict):
        raise refuse_field(name, schema, "a JSON schema, as an object")
    return ReplySchema(text=spell_json(schema), field=name)
