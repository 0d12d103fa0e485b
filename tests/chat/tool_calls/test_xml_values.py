"""Arguments written as text between XML tags: typed by their schema, in every format that writes them so."""

from __future__ import annotations

import pytest

from forgejax.chat.tool_calls import CallSpan, TextSpan
from tests.chat.tool_calls.parsing import parse


def xml(name: str, function: str, **values: str) -> str:
    if name == "minimax":
        inner = "".join(f'<parameter name="{key}">{value}</parameter>' for key, value in values.items())
        return f'<minimax:tool_call>\n<invoke name="{function}">{inner}</invoke>\n</minimax:tool_call>'
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={function}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize("run", [1, 7, 1000])
@pytest.mark.parametrize("name", ["qwen3_coder", "minimax"])
def test_values_are_typed_by_the_schema_and_strings_stay_as_they_are(name: str, run: int) -> None:
    given = {"n": "3", "x": "2.5", "yes": "true", "box": '{"a": [1]}', "row": "[1, 2]", "maybe": "null", "either": "7"}
    call = xml(name, "f", s=" 5\n<b> ", free="12", **given)
    text = "Let me see.\n" + call
    spelled = (
        '{"s": " 5\\n<b> ", "free": "12", "n": 3, "x": 2.5, "yes": true, "box": {"a": [1]}, "row": [1, 2], '
        '"maybe": null, "either": 7}'
    )
    assert parse(name, text, run) == [
        TextSpan(text="Let me see."),
        CallSpan(
            name="f",
            arguments={
                "s": " 5\n<b> ",
                "free": "12",
                "n": 3,
                "x": 2.5,
                "yes": True,
                "box": {"a": [1]},
                "row": [1, 2],
                "maybe": None,
                "either": 7,
            },
            text=spelled,
        ),
    ]


def test_python_words_are_qwen3_coders_alone() -> None:
    (call,) = parse("qwen3_coder", xml("qwen3_coder", "f", s="True", yes="False"))
    assert isinstance(call, CallSpan) and call.arguments == {"s": "True", "yes": False}
    (faulty,) = parse("minimax", xml("minimax", "f", s="True", yes="False"))
    assert isinstance(faulty, CallSpan) and faulty.problem is not None and faulty.text == '{"s": "True"'


@pytest.mark.parametrize("name", ["qwen3_coder", "minimax"])
@pytest.mark.parametrize(
    ("function", "values", "text", "problem"),
    [
        ("g", {"s": "a"}, '{"s": "a"}', "unknown tool 'g'"),
        ("f", {}, "{}", "missing arguments: s"),
        ("f", {"s": "a", "n": "three"}, '{"s": "a"', "parameter n: not JSON"),
        ("f", {"s": "a", "n": "2.5"}, '{"s": "a"', "parameter n: '2.5' is not of type integer"),
        ("f", {"s": "a", "yes": "1"}, '{"s": "a"', "'1' is not of type boolean"),
        ("f", {"s": "a", "box": "[1]"}, '{"s": "a"', "not of type object"),
        ("f", {"s": "a</parameter>b"}, '{"s": "a"', "expected <parameter"),
    ],
)
def test_a_faulty_xml_call_is_handed_over_as_far_as_it_can_be_read(
    name: str, function: str, values: dict[str, str], text: str, problem: str
) -> None:
    for run in (1, 1000):
        (call,) = parse(name, xml(name, function, **values), run)
        assert isinstance(call, CallSpan) and (call.name, call.text) == (function, text)
        assert call.problem is not None and problem in call.problem
