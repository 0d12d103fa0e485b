"""Hermes' calls: what is read, and what is told apart as malformed."""

from __future__ import annotations

import pytest

from forgejax.chat.tool_calls import CallSpan, CallText, HermesFormat, MalformedSpan, Span, TextSpan
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
    found: list[str | tuple[str]] = []
    for span in read(text, run):
        if isinstance(span, CallSpan):
            assert span.arguments is not None and span.problem is None
            found.append((span.arguments["expression"],))
        else:
            assert isinstance(span, TextSpan)
            found.append(span.text)
    assert found == expected


@pytest.mark.parametrize("run", [1, 1000])
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{name: calculator}", "not JSON"),
        ("", "not JSON"),
        ("[" * 1000, "not JSON"),
        ('["calculator"]', "not JSON: '[' where an object belongs"),
        ('{"name": "calculator", "parameters": {"expression": "1"}}', "not an object of"),
        ('{"name": ["calculator"], "arguments": {"expression": "1"}}', "not an object of"),
        ('{"arguments": {"expression": "1"}}', "not an object of"),
        ('{"name": "calculator", "arguments": ok', "not JSON: 'ok'"),
        ('{"name": "", "arguments": {}}', "not an object of"),
        ('{"name": "calc\n", "arguments": {}}', "must be escaped"),
    ],
)
def test_an_attempt_that_says_not_what_it_calls_is_malformed_and_kept_as_it_was_written(
    body: str, problem: str, run: int
) -> None:
    text = f"<tool_call>{body}</tool_call>"
    (span,) = read(text, run)
    assert isinstance(span, MalformedSpan) and span.text == text and problem in span.problem


@pytest.mark.parametrize("run", [1, 1000])
@pytest.mark.parametrize(
    ("call", "given", "problem"),
    [
        ('{"name": "calculator", "arguments": {"expression": NaN}}', '{"expression": ', "NaN"),
        ('{"name": "calculator", "arguments": {"expression": 1e999}}', '{"expression": 1e999}', "Out of range"),
        ('{"name": "calculator", "name": "x", "arguments": {"expression": "1"}}', '{"expression": "1"}', "twice"),
        ('{"name": "calculator", "arguments": {"expression": "\\ud800"}}', '{"expression": "\\ud800"}', "surrogate"),
        ('{"name": "calculator", "arguments": {"expression": "a\nb"}}', '{"expression": "a', "must be escaped"),
        ('{"name": "calculator", "arguments": {"expression": "1"}, }', '{"expression": "1"}', "where a key belongs"),
        ('{"name": "calculator", "arguments": {"expression": "1"}} x', '{"expression": "1"}', "text behind the object"),
        ('{"name": "calculator", "arguments": {"expression": "1"}, "x": 1}', '{"expression": "1"}', "not an object of"),
        ('{"name": "abacus", "arguments": {"expression": "1"}}', '{"expression": "1"}', "unknown tool 'abacus'"),
        ('{"name": "calculator", "arguments": "1"}', "1", "arguments are not an object"),
        ('{"name": "calculator", "arguments": "{\\"a\\": 1}"}', '{"a": 1}', "arguments are not an object"),
        ('{"name": "calculator", "arguments": {"expr": "1"}}', '{"expr": "1"}', "missing arguments: expression"),
    ],
)
def test_a_faulty_call_that_says_what_it_calls_is_handed_over_with_its_fault(
    call: str, given: str, problem: str, run: int
) -> None:
    (span,) = read(f"<tool_call>{call}</tool_call>", run)
    assert isinstance(span, CallSpan) and span.problem is not None
    assert (span.text, problem in span.problem) == (given, True), span


def test_arguments_are_handed_over_as_they_are_drawn_and_are_a_beginning_of_json_all_the_way() -> None:
    parser = HermesFormat().make_parser([CALCULATOR])
    parser.push('<tool_call>{"name": "calculator", "arguments": ')
    drawn = '{"expression": "1\\u00e9\\n2", "n": -12.5e3}'
    seen = []
    for character in drawn + "}</tool_call>":
        seen += [span.text for span in parser.push(character) if isinstance(span, CallText)]
    assert "".join(seen) == drawn and len(seen) > 20
    assert "\\u00e9" in seen and "-12.5e3}" in seen


def test_a_closing_tag_inside_a_string_is_a_part_of_it() -> None:
    text = '<tool_call>{"name": "calculator", "arguments": {"expression": "</tool_call>"}}</tool_call>Done.'
    assert read(text, 3) == [
        CallSpan(name="calculator", text='{"expression": "</tool_call>"}', arguments={"expression": "</tool_call>"}),
        TextSpan(text="Done."),
    ]


@pytest.mark.parametrize(
    ("cut", "given", "arguments"),
    [("1", '{"expression": "1', None), ('1"}', '{"expression": "1"}', {"expression": "1"})],
)
def test_an_unclosed_call_is_faulty(cut: str, given: str, arguments: dict[str, str] | None) -> None:
    text = '<tool_call>{"name": "calculator", "arguments": {"expression": "'
    assert read(f"Hm. {text}{cut}", 2) == [
        TextSpan(text="Hm."),
        CallSpan(name="calculator", text=given, arguments=arguments, problem="<tool_call> is never closed"),
    ]


def test_a_good_call_after_a_malformed_one_counts() -> None:
    kinds = [type(span) for span in read("<tool_call>x</tool_call>" + GOOD, 5)]
    assert kinds == [MalformedSpan, CallSpan]
