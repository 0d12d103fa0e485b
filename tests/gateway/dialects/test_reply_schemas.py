"""How each vendor's API asks for a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forgejax.chat.messages import ReplySchema
from forgejax.gateway.dialects import DIALECTS
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError

SCHEMA = {"properties": {"b": {"const": "ü"}, "a": {}}, "type": "object"}
TEXT = '{"properties":{"b":{"const":"ü"},"a":{}},"type":"object"}'
INSIDE = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
FLAT = {"type": "json_schema", "name": "n", "schema": SCHEMA}
CHAT, RESPONSES, MESSAGES = range(3)
ASKED = [{"role": "user", "content": "?"}]


def parse(dialect: int, **body: Any) -> Any:
    asked = {"input": ASKED} if dialect == RESPONSES else {"messages": ASKED}
    return DIALECTS[dialect].parse(asked | body, ReplyMemory())


@pytest.mark.parametrize(
    ("dialect", "body", "field"),
    [
        (CHAT, {"response_format": INSIDE}, "response_format.json_schema.schema"),
        (CHAT, {"guided_json": SCHEMA}, "guided_json"),
        (CHAT, {"guided_json": json.dumps(SCHEMA)}, "guided_json"),
        (CHAT, {"guided_json": SCHEMA, "response_format": INSIDE}, "response_format.json_schema.schema"),
        (RESPONSES, {"text": {"format": FLAT}}, "text.format.schema"),
        (MESSAGES, {"output_config": {"format": FLAT}}, "output_config.format.schema"),
        (MESSAGES, {"output_format": FLAT}, "output_format.schema"),
    ],
)
def test_the_schema_is_read_with_its_properties_in_order(dialect: int, body: dict[str, Any], field: str) -> None:
    parsed = parse(dialect, **body)
    assert parsed.chat.schema == ReplySchema(text=TEXT, field=field) and parsed.ignored == ()


@pytest.mark.parametrize("body", [{}, {"response_format": None}, {"response_format": {"type": "text"}}])
def test_text_is_bound_to_nothing(body: dict[str, Any]) -> None:
    assert parse(CHAT, **body).chat.schema is None


def test_any_object_is_a_schema_as_well() -> None:
    asked = {"type": "json_object"}
    assert parse(CHAT, response_format=asked).chat.schema.text == '{"type":"object"}'
    assert parse(RESPONSES, text={"format": asked}).chat.schema.text == '{"type":"object"}'


def test_what_stands_beside_the_format_and_has_no_effect_is_counted() -> None:
    assert parse(RESPONSES, text={"verbosity": "low", "format": FLAT}).ignored == ("verbosity",)
    assert parse(MESSAGES, output_config={"effort": "low", "format": FLAT}).ignored == ("output_config",)


@pytest.mark.parametrize(
    ("dialect", "body", "param"),
    [
        (CHAT, {"response_format": "json"}, "response_format"),
        (CHAT, {"response_format": {"type": "grammar"}}, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (CHAT, {"guided_json": "{"}, "guided_json"),
        (CHAT, {"guided_json": [SCHEMA]}, "guided_json"),
        (CHAT, {"guided_json": {"type": "array"}, "response_format": INSIDE}, "guided_json"),
        (RESPONSES, {"text": []}, None),
        (RESPONSES, {"text": "json"}, "text"),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": 1}}}, "output_config.format.schema"),
    ],
)
def test_what_is_no_schema_is_refused_by_its_field(dialect: int, body: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert parse(dialect, **body).chat.schema is None  # an empty value asks for nothing
        return
    with pytest.raises(RefusedError) as refused:
        parse(dialect, **body)
    assert (refused.value.status, refused.value.param) == (400, param)
