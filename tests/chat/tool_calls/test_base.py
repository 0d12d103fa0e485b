"""The laws of every tool-call format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, CallSpan, MalformedSpan, TextSpan
from tests.chat.tool_calls.parsing import LLAMA, TOOLS, parse


def test_nothing_is_held_back_longer_than_needed() -> None:
    for name in TOOL_CALL_FORMATS:
        parser = TOOL_CALL_FORMATS[name].make_parser(TOOLS)
        assert parser.push("Well, a <") == [TextSpan(text="Well, a")]
        assert parser.push("b") == [TextSpan(text=" <b")]
    parser = TOOL_CALL_FORMATS["llama3"].make_parser(TOOLS)
    assert parser.push('{"na') == [] and parser.push('ture": 1') == [TextSpan(text='{"nature": 1')]


@pytest.mark.parametrize(
    ("name", "rests"),
    [
        ("hermes", (' "f", "arguments": {"s": "a"}}</tool_call>', ' {"s": "a"}}</tool_call>')),
        ("llama3", (' "f", "parameters": {"s": "a"}}', ' {"s": "a"}}')),
        ("qwen3_coder", ("f>\n<parameter=s>\na\n</parameter>\n</function>\n</tool_call>",) * 2),
        ("minimax", ('f"><parameter name="s">a</parameter></invoke></minimax:tool_call>',) * 2),
    ],
)
def test_a_call_that_was_begun_for_the_policy_is_one(name: str, rests: tuple[str, str]) -> None:
    named_rest = rests[1].removeprefix("f>\n").removeprefix('f">')
    for text in (
        TOOL_CALL_FORMATS[name].open_call(None) + rests[0],
        TOOL_CALL_FORMATS[name].open_call("f") + named_rest,
    ):
        (call,) = parse(name, text, 3)
        assert isinstance(call, CallSpan) and (call.name, call.arguments, call.problem) == ("f", {"s": "a"}, None)


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
    said = (TextSpan, MalformedSpan)
    joined = ["".join(p.text for p in spans if isinstance(p, said)) for spans in (streamed, whole)]
    assert joined[0] == joined[1]
    assert [p for p in streamed if isinstance(p, CallSpan)] == [p for p in whole if isinstance(p, CallSpan)]
    if not any(isinstance(span, CallSpan) for span in whole):
        assert joined[0] == text
