"""Thoughts: where templates look for them, and how they are cut off what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.messages import Message, ReasoningPart, RefusalPart, TextPart, read_call
from forgejax.chat.thoughts import ThoughtFormat, ThoughtSplitter
from tests.chat.families import FAMILIES, save_family
from tests.chat.tokenizers import HERMES_TEMPLATE, save_tokenizer

FORMAT = ThoughtFormat(opening="<think>", closing="</think>", field=None)


def split(text: str, run: int, inside: bool = False) -> tuple[str, str]:
    splitter = ThoughtSplitter(FORMAT, inside=inside)
    joined = {"reasoning": "", "text": ""}
    pieces = [p for at in range(0, len(text), run) for p in splitter.push(text[at : at + run])]
    for channel, piece in [*pieces, *splitter.finish()]:
        assert piece
        joined[channel] += piece
    return joined["reasoning"], joined["text"]


@pytest.mark.parametrize("run", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "inside", "thought", "words"),
    [
        ("plain ", False, "", "plain "),
        (" \n", False, "", " \n"),
        ("<thin", False, "", "<thin"),
        ("<think>\nhm\n\nhm\n</think>\n\nSo. \n", False, "hm\n\nhm", "So. \n"),
        ("\n<think></think>x", False, "", "x"),
        ("<think>a</think><think>b</think>c", False, "a", "<think>b</think>c"),
        ("a < b </thin k", True, "a < b </thin k", ""),
        ("\nhm\n</think>\n5", True, "hm", "5"),
        ("x <think>a</think>", False, "", "x <think>a</think>"),
    ],
)
def test_the_thought_is_cut_off_the_beginning_however_it_comes(
    text: str, inside: bool, thought: str, words: str, run: int
) -> None:
    assert split(text, run, inside) == (thought, words)


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_that_read_the_content_get_thoughts_in_it(tmp_path: Path, family: str) -> None:
    thoughts = ChatFormat.load(save_family(tmp_path, family)).thoughts
    assert thoughts == replace(FORMAT, known="<think>" in FAMILIES[family][0] or "<think>" in FAMILIES[family][2])
    message = Message(role="assistant", parts=(ReasoningPart(text="hm"), TextPart(text="5")))
    assert thoughts.spell(message) == {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}
    assert thoughts.opens("x<think>\n") and not thoughts.opens("x</think>\n")


def test_a_template_that_reads_a_field_gets_thoughts_in_it(tmp_path: Path) -> None:
    reading = HERMES_TEMPLATE.replace(
        "'<|im_start|>assistant\\n' + message.content }}",
        "'<|im_start|>assistant\\n' + ('[THINK]' + message.reasoning_content + '[/THINK]' "
        "if message.reasoning_content else '') + message.content }}",
    )
    chat_format = ChatFormat.load(save_tokenizer(tmp_path, reading))
    assert chat_format.thoughts == ThoughtFormat(opening="[THINK]", closing="[/THINK]", field="reasoning_content")
    message = Message(role="assistant", parts=(ReasoningPart(text="hm"), TextPart(text="5")))
    asked = Message.of_text("user", "?")
    assert "[THINK]hm[/THINK]5<|im_end|>" in chat_format.render_chat([asked, message, asked]).text


def test_a_call_that_is_none_is_spelled_as_text_beside_those_that_are() -> None:
    parts = (RefusalPart(text="No. "), read_call("f", '{"a": 1}', "c"), read_call("g", '{"cut', "d"))
    spelled = FORMAT.spell(Message(role="assistant", parts=parts))
    assert spelled == {
        "role": "assistant",
        "content": 'No. g({"cut)',
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }


def test_a_thought_in_the_text_is_reasoning_and_one_behind_words_is_not() -> None:
    said = Message.of_text("assistant", "<think>\nhm\n</think>\n\n5")
    assert FORMAT.split_message(said).parts == (ReasoningPart(text="hm"), TextPart(text="5"))
    for text in ("5 <think>hm</think>", "<think>never closed"):
        said = Message.of_text("assistant", text)
        assert FORMAT.split_message(said) is said
