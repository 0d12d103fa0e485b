"""The XML and Llama formats: what they read, what they refuse, and what they hold back while streaming."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, CallSpan, MalformedSpan, Span, TextSpan

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


def parse(name: str, text: str, run: int = 1) -> list[Span]:
    """The spans of a reply pushed in runs of characters, neighbouring text joined."""
    parser = TOOL_CALL_FORMATS[name].parser(TOOLS)
    spans: list[Span] = []
    for span in [p for at in range(0, len(text), run) for p in parser.push(text[at : at + run])] + parser.finish():
        if spans and isinstance(span, TextSpan) and isinstance(spans[-1], TextSpan):
            spans[-1] = TextSpan(text=spans[-1].text + span.text)
        else:
            spans.append(span)
    return spans


def xml(name: str, function: str, **values: str) -> str:
    if name == "minimax":
        inner = "".join(f'<parameter name="{key}">{value}</parameter>' for key, value in values.items())
        return f'<minimax:tool_call>\n<invoke name="{function}">{inner}</invoke>\n</minimax:tool_call>'
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={function}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize("run", [1, 7, 1000])
@pytest.mark.parametrize("name", ["qwen3_coder", "minimax"])
def test_values_are_typed_by_the_schema_and_strings_stay_as_they_are(name: str, run: int) -> None:
    opening, closing = TOOL_CALL_FORMATS[name].markers
    given = {"n": "3", "x": "2.5", "yes": "true", "box": '{"a": [1]}', "row": "[1, 2]", "maybe": "null", "either": "7"}
    call = xml(name, "f", s=" 5\n<b> ", free="12", **given)
    text = "Let me see.\n" + call
    body = call.removeprefix(opening).removesuffix(closing)
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
            raw=body.strip() if name == "minimax" else body,
        ),
    ]


def test_python_words_are_qwen3_coders_alone() -> None:
    (call,) = parse("qwen3_coder", xml("qwen3_coder", "f", s="True", yes="False"))
    assert isinstance(call, CallSpan) and call.arguments == {"s": "True", "yes": False}
    (malformed,) = parse("minimax", xml("minimax", "f", s="True", yes="False"))
    assert isinstance(malformed, MalformedSpan)


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
    (span,) = parse(name, text)
    assert isinstance(span, MalformedSpan) and span.text == text and problem in span.problem


def test_one_minimax_block_holds_all_calls_or_none() -> None:
    good = '<invoke name="bare"></invoke>'
    block = "<minimax:tool_call>\n{}\n</minimax:tool_call>"
    assert [type(span) for span in parse("minimax", block.format(good + "\n" + good))] == [CallSpan, CallSpan]
    half = block.format(good + '<invoke name="g"></invoke>')
    assert parse("minimax", half) == [MalformedSpan(text=half, problem="unknown tool 'g'")]
    assert isinstance(parse("minimax", block.format(""))[0], MalformedSpan)


LLAMA = '{"name": "f", "parameters": {"s": "}{\\"", "n": 3}}'


@pytest.mark.parametrize("run", [1, 5, 1000])
@pytest.mark.parametrize(
    "text", [LLAMA, f" \n{LLAMA}\n", f"<|python_tag|>{LLAMA}", LLAMA.replace("{", '{"type": "function", ', 1)]
)
def test_a_llama_reply_that_is_one_object_is_a_call(text: str, run: int) -> None:
    written = text.strip().removeprefix("<|python_tag|>")
    (call,) = parse("llama3", text, run)
    assert isinstance(call, CallSpan) and (call.name, call.arguments) == ("f", {"s": '}{"', "n": 3})
    assert call.raw.strip() == written


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ('{"answer": 5}', [TextSpan]),
        ("{", [TextSpan]),
        (f"So: {LLAMA}", [TextSpan]),
        (f"So:\n<|python_tag|>{LLAMA}", [TextSpan, CallSpan]),
        (f"{LLAMA}; {LLAMA}", [MalformedSpan, TextSpan]),
        ("<|python_tag|>print(1)", [MalformedSpan, TextSpan]),
        (LLAMA[:-1], [MalformedSpan]),
        (LLAMA.replace('"f"', '"g"') + " Done.", [MalformedSpan, TextSpan]),
        (LLAMA.replace("parameters", "arguments"), [MalformedSpan]),
    ],
)
def test_what_only_looks_like_a_llama_call_is_text_or_malformed(text: str, kinds: list[type[Span]]) -> None:
    for run in (1, 1000):
        assert {*map(type, parse("llama3", text, run))} == {*kinds}


def test_nothing_is_held_back_longer_than_needed() -> None:
    for name in TOOL_CALL_FORMATS:
        parser = TOOL_CALL_FORMATS[name].parser(TOOLS)
        assert parser.push("Well, a <") == [TextSpan(text="Well, a")]
        assert parser.push("b") == [TextSpan(text=" <b")]
    parser = TOOL_CALL_FORMATS["llama3"].parser(TOOLS)
    assert parser.push('{"na') == [] and parser.push('ture": 1') == [TextSpan(text='{"nature": 1')]


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
    joined = ["".join(p.text for p in spans if not isinstance(p, CallSpan)) for spans in (streamed, whole)]
    assert joined[0] == joined[1]
    assert [p for p in streamed if isinstance(p, CallSpan)] == [p for p in whole if isinstance(p, CallSpan)]
    if not any(isinstance(span, CallSpan) for span in whole):
        assert joined[0] == text
