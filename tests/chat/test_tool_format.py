"""The XML and Llama formats: what they read, what they refuse, and what they hold back while streaming."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, CallPart, MalformedPart, Part, TextPart

PROPERTIES = {
    "n": {"type": "integer"},
    "x": {"type": "number"},
    "yes": {"type": "boolean"},
    "box": {"type": "object"},
    "row": {"type": "array"},
    "s": {"type": "string"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "either": {"type": ["integer", "string"]},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": PROPERTIES, "required": ["s"]}}},
    {"type": "function", "function": {"name": "bare"}},
]


def parse(name: str, text: str, run: int = 1) -> list[Part]:
    """The parts of a reply pushed in runs of characters, neighbouring text joined."""
    parser = TOOL_CALL_FORMATS[name].parser(TOOLS)
    parts: list[Part] = []
    for part in [p for at in range(0, len(text), run) for p in parser.push(text[at : at + run])] + parser.finish():
        if parts and isinstance(part, TextPart) and isinstance(parts[-1], TextPart):
            parts[-1] = TextPart(text=parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


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
    text = "Let me see.\n" + xml(name, "f", s=" 5\n<b> ", free="12", **given)
    assert parse(name, text, run) == [
        TextPart(text="Let me see."),
        CallPart(
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
        ),
    ]


def test_python_words_are_qwen3_coders_alone() -> None:
    (call,) = parse("qwen3_coder", xml("qwen3_coder", "f", s="True", yes="False"))
    assert isinstance(call, CallPart) and call.arguments == {"s": "True", "yes": False}
    (malformed,) = parse("minimax", xml("minimax", "f", s="True", yes="False"))
    assert isinstance(malformed, MalformedPart)


@pytest.mark.parametrize("name", ["qwen3_coder", "minimax"])
@pytest.mark.parametrize(
    ("function", "values", "problem"),
    [
        ("g", {"s": "a"}, "unknown tool 'g'"),
        ("f", {}, "missing arguments: s"),
        ("f", {"s": "a", "n": "three"}, "parameter n: not JSON"),
        ("f", {"s": "a", "n": "2.5"}, "parameter n: '2.5' is not of type integer"),
        ("f", {"s": "a", "yes": "1"}, "'1' is not of type boolean"),
        ("f", {"s": "a", "box": "[1]"}, "not of type object"),
        ("f", {"s": "a</parameter>b"}, "expected <parameter"),
    ],
)
def test_a_malformed_xml_call_is_kept_as_text(name: str, function: str, values: dict[str, str], problem: str) -> None:
    text = xml(name, function, **values)
    (part,) = parse(name, text)
    assert isinstance(part, MalformedPart) and part.text == text and problem in part.problem


def test_one_minimax_block_holds_all_calls_or_none() -> None:
    good = '<invoke name="bare"></invoke>'
    block = "<minimax:tool_call>\n{}\n</minimax:tool_call>"
    assert [type(part) for part in parse("minimax", block.format(good + "\n" + good))] == [CallPart, CallPart]
    half = block.format(good + '<invoke name="g"></invoke>')
    assert parse("minimax", half) == [MalformedPart(text=half, problem="unknown tool 'g'")]
    assert isinstance(parse("minimax", block.format(""))[0], MalformedPart)


LLAMA = '{"name": "f", "parameters": {"s": "}{\\"", "n": 3}}'


@pytest.mark.parametrize("run", [1, 5, 1000])
@pytest.mark.parametrize(
    "text", [LLAMA, f" \n{LLAMA}\n", f"<|python_tag|>{LLAMA}", LLAMA.replace("{", '{"type": "function", ', 1)]
)
def test_a_llama_reply_that_is_one_object_is_a_call(text: str, run: int) -> None:
    assert parse("llama3", text, run) == [CallPart(name="f", arguments={"s": '}{"', "n": 3})]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ('{"answer": 5}', [TextPart]),
        ("{", [TextPart]),
        (f"So: {LLAMA}", [TextPart]),
        (f"So:\n<|python_tag|>{LLAMA}", [TextPart, CallPart]),
        (f"{LLAMA}; {LLAMA}", [MalformedPart, TextPart]),
        ("<|python_tag|>print(1)", [MalformedPart, TextPart]),
        (LLAMA[:-1], [MalformedPart]),
        (LLAMA.replace('"f"', '"g"') + " Done.", [MalformedPart, TextPart]),
        (LLAMA.replace("parameters", "arguments"), [MalformedPart]),
    ],
)
def test_what_only_looks_like_a_llama_call_is_text_or_malformed(text: str, kinds: list[type[Part]]) -> None:
    for run in (1, 1000):
        assert {*map(type, parse("llama3", text, run))} == {*kinds}


def test_nothing_is_held_back_longer_than_needed() -> None:
    for name in TOOL_CALL_FORMATS:
        parser = TOOL_CALL_FORMATS[name].parser(TOOLS)
        assert parser.push("Well, a <") == [TextPart(text="Well, a")]
        assert parser.push("b") == [TextPart(text=" <b")]
    parser = TOOL_CALL_FORMATS["llama3"].parser(TOOLS)
    assert parser.push('{"na') == [] and parser.push('ture": 1') == [TextPart(text='{"nature": 1')]


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<|python_tag|>",
    LLAMA,
    " ",
    "\n",
]
PIECES += [
    "<function=f>",
    "</function>",
    '<invoke name="f">',
    "</invoke>",
    "<parameter=s>",
    "</parameter>",
    "x",
    "{",
    "<",
]


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    cuts=st.integers(1, 9),
    name=st.sampled_from(sorted(TOOL_CALL_FORMATS)),
)
def test_streamed_parts_are_the_whole_replys_and_no_text_is_lost(pieces: list[str], cuts: int, name: str) -> None:
    text = "".join(pieces)
    streamed, whole = parse(name, text, cuts), parse(name, text, 10_000)
    joined = ["".join(p.text for p in parts if not isinstance(p, CallPart)) for parts in (streamed, whole)]
    assert joined[0] == joined[1]
    assert [p for p in streamed if isinstance(p, CallPart)] == [p for p in whole if isinstance(p, CallPart)]
    if not any(isinstance(part, CallPart) for part in whole):
        assert joined[0] == text
