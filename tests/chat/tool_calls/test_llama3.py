"""Llama's calls, which have no closing tag."""

from __future__ import annotations

import pytest

from forgejax.chat.tool_calls import CallSpan, MalformedSpan, Span, TextSpan
from tests.chat.tool_calls.parsing import LLAMA, parse


@pytest.mark.parametrize("run", [1, 5, 1000])
@pytest.mark.parametrize(
    "text", [LLAMA, f" \n{LLAMA}\n", f"<|python_tag|>{LLAMA}", LLAMA.replace("{", '{"type": "function", ', 1)]
)
def test_a_llama_reply_that_is_one_object_is_a_call(text: str, run: int) -> None:
    (call,) = parse("llama3", text, run)
    assert isinstance(call, CallSpan) and (call.name, call.arguments) == ("f", {"s": '}{"', "n": 3})
    assert (call.text, call.problem) == ('{"s": "}{\\"", "n": 3}', None)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ('{"answer": 5}', [TextSpan]),
        ("{", [TextSpan]),
        (f"So: {LLAMA}", [TextSpan]),
        (f"So:\n<|python_tag|>{LLAMA}", [TextSpan, CallSpan]),
        (f"{LLAMA}; {LLAMA}", [CallSpan, TextSpan]),
        ("<|python_tag|>print(1)", [MalformedSpan, TextSpan]),
        (LLAMA[:-1], [CallSpan]),
        (LLAMA.replace('"f"', '"g"') + " Done.", [CallSpan, TextSpan]),
        (LLAMA.replace("parameters", "arguments"), [MalformedSpan]),
    ],
)
def test_what_only_looks_like_a_llama_call_is_text_or_malformed(text: str, kinds: list[type[Span]]) -> None:
    for run in (1, 1000):
        spans = parse("llama3", text, run)
        assert list(map(type, spans)) == kinds
        calls = [span for span in spans if isinstance(span, CallSpan)]
        assert all((call.problem is None) == text.startswith("So:") for call in calls)
