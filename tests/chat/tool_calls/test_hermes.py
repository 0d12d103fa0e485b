"""Hermes' calls: what is read, and what is told apart as malformed."""

from __future__ import annotations

import pytest

from forgejax.chat.tool_calls import CallSpan, MalformedSpan, Span, TextSpan
from tests.chat.tokenizers import CALCULATOR
from tests.chat.tool_calls.parsing import parse


def read(text: str, run: int) -> list[Span]:
    return parse("hermes", text, run, [CALCULATOR])


GOOD = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>'


@pytest.mark.parametrize("run", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain  text \n", ["plain  text \n"]),
        ("a < b <tool> <tool_cal", ["a < b <tool> <tool_cal"]),
        (GOOD, [("2+3",)]),
        ("Let me see.\n" + GOOD, ["Let me see.", ("2+3",)]),
        (GOOD + "\n" + GOOD + "\n", [("2+3",), ("2+3",)]),
        (GOOD + "\nDone.", [("2+3",), "Done."]),
    ],
)
def test_calls_are_cut_out_of_the_text(text: str, expected: list[str | tuple[str]], run: int) -> None:
    found = [(span.arguments["expression"],) if isinstance(span, CallSpan) else span.text for span in read(text, run)]
    assert found == expected


@pytest.mark.parametrize("run", [1, 1000])
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{name: calculator}", "not JSON"),
        ("", "not JSON"),
        ('{"name": "calculator", "arguments": {"expression": NaN}}', "NaN"),
        ('{"name": "calculator", "arguments": {"expression": 1e999}}', "Out of range"),
        ('{"name": "calculator", "name": "x", "arguments": {"expression": "1"}}', "twice"),
        ('{"name": "calculator", "arguments": {"expression": "\\ud800"}}', "surrogate"),
        ("[" * 100_000, "not JSON"),
        ('["calculator"]', "not an object"),
        ('{"name": "calculator", "parameters": {"expression": "1"}}', "not an object of"),
        ('{"name": "abacus", "arguments": {"expression": "1"}}', "unknown tool 'abacus'"),
        ('{"name": ["calculator"], "arguments": {"expression": "1"}}', "unknown tool"),
        ('{"name": "calculator", "arguments": "1"}', "arguments are not an object"),
        ('{"name": "calculator", "arguments": {"expr": "1"}}', "missing arguments: expression"),
    ],
)
def test_a_malformed_call_is_told_apart_and_kept_as_it_was_written(body: str, problem: str, run: int) -> None:
    if len(body) > 1000:
        run = 1000
    text = f"<tool_call>{body}</tool_call>"
    (span,) = read(text, run)
    assert isinstance(span, MalformedSpan) and span.text == text and problem in span.problem


def test_an_unclosed_call_is_malformed() -> None:
    text = '<tool_call>{"name": "calculator", "arguments": {"expression": "1"}}'
    assert read(f"Hm. {text}", 2) == [
        TextSpan(text="Hm. "),
        MalformedSpan(text=text, problem="<tool_call> is never closed"),
    ]


def test_a_good_call_after_a_malformed_one_counts() -> None:
    kinds = [type(span) for span in read("<tool_call>x</tool_call>" + GOOD, 5)]
    assert kinds == [MalformedSpan, CallSpan]
