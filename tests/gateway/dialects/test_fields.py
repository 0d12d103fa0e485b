"""The table of fields in the docs is what the dialects do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from forgejax.gateway.dialects import DIALECTS
from forgejax.gateway.dialects.fields import IGNORED, list_ignored, read_stops
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError
from tests.chat.tokenizers import CALCULATOR

PAGE = (Path(__file__).parents[3] / "docs" / "gateway.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \|$", PAGE, re.MULTILINE)
ASKED = [{"role": "user", "content": "?"}]
LEAST: dict[str, dict[str, Any]] = {
    "chat_completions": {"messages": ASKED},
    "responses": {"input": ASKED},
    "messages": {"messages": ASKED},
}
SAMPLES: dict[str, Any] = {
    "messages": ASKED,
    "input": ASKED,
    "model": "m",
    "tools": [],
    "functions": [CALCULATOR["function"]],
    "function_call": "auto",
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "logit_bias": {"5": -100},
    "max_tokens": 9,
    "max_completion_tokens": 9,
    "max_output_tokens": 9,
    "stop": ["x"],
    "stop_sequences": ["x"],
    "seed": 5,
    "logprobs": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "system": "Be brief.",
    "instructions": "Be brief.",
    "store": False,
    "n": 2,
    "top_logprobs": 2,
    "background": True,
    "response_format": {"type": "json_object"},
    "guided_json": {"type": "object"},
    "text": {"format": {"type": "json_object"}},
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
    "output_format": {"type": "json_schema", "schema": {}},
}


@pytest.mark.parametrize("column", range(3), ids=[dialect.name for dialect in DIALECTS])
def test_every_field_is_served_ignored_or_refused_as_the_docs_say(column: int) -> None:
    dialect = DIALECTS[column]
    assert len(ROWS) > 50 and {row[0] for row in ROWS} >= IGNORED
    for row in ROWS:
        field, said = row[0], row[1 + column]
        sample = SAMPLES.get(field, {"type": "auto"})
        if field == "tool_choice" and dialect.name != "messages":
            sample = "auto"
        if field == "previous_response_id" and said == "served":
            continue  # needs a stored response; tested with one
        try:
            ignored = dialect.parse({**LEAST[dialect.name], field: sample}, ReplyMemory()).ignored
        except RefusedError as refusal:
            found = "refused" if refusal.param == field else str(refusal)
        else:
            found = "other" if "other" in ignored else "ignored" if field in ignored else "served"
        assert found == said, field


def test_null_asks_for_nothing_and_unknown_fields_are_one() -> None:
    body = {"a": 1, "b": 2, "min_tokens": 1, "logit_bias": None, "stop": None}
    assert list_ignored(body, frozenset({"stop"})) == ("min_tokens", "other")


@pytest.mark.parametrize("value", [10**400, -(10**400), "1", True, [1]])
@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_what_is_no_number_a_float_can_hold_is_refused_by_name(field: str, value: object) -> None:
    for dialect in DIALECTS:
        with pytest.raises(RefusedError, match=f"^{field} is .*; expected a number") as refused:
            dialect.parse({**LEAST[dialect.name], field: value}, ReplyMemory())
        assert refused.value.status == 400


def test_stops_are_as_many_and_as_long_as_an_engine_can_look_for_at_each_token() -> None:
    most = [f"{number:0256}" for number in range(64)]
    assert read_stops({"stop": [*most[1:], ""]}, "stop") == tuple(most[1:])
    assert read_stops({"stop": most}, "stop") == tuple(most)
    with pytest.raises(RefusedError, match="stop is 'an array of 65'; expected at most 64 strings"):
        read_stops({"stop": [*most, "x"]}, "stop")
    for long in ("x" * 257, ["a", "x" * 257]):
        with pytest.raises(RefusedError, match="stop is '257 characters long'; expected at most 256 in each string"):
            read_stops({"stop": long}, "stop")
