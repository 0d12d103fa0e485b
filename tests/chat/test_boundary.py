"""The boundary law: what is appended for the next turn is what a full render has after that turn, or it is a branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from forgejax.chat import ChatFormat
from forgejax.chat.format import SpokenTurn, TextMark
from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, PlainTextFormat
from forgejax.chat.tool_format import choose_tool_format
from forgejax.gateway.conversation import Conversation
from forgejax.types import FinishReason, SampleRequest
from tests.chat.families import FAMILIES, save_family
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.fakes import completion

SHIPPED = sorted(Path(__file__).parents[2].glob("examples/*/tokenizer"))
USER = {"role": "user", "content": "What is 2+3?"}
RESULT = {"role": "tool", "content": "5"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}],
}


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatFormat]:
    folders = {family: save_family(tmp_path_factory.mktemp("family"), family) for family in FAMILIES}
    folders |= {folder.parent.name: folder for folder in SHIPPED}
    return {name: ChatFormat.load(folder) for name, folder in folders.items()}


NAMES = [*FAMILIES, *(folder.parent.name for folder in SHIPPED)]
CONTROLS = (
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|eot_id|>",
    "[e~[",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
PIECES = ("", " ", "\n", "a", "the user", "é🙂", "<", "|>", "{", '{"name": ', "\ufdd0", "\u0301", "<tool_response>")
WORDS = st.lists(st.sampled_from(CONTROLS + PIECES) | st.text(max_size=4), max_size=5).map("".join)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_next_prompt_is_the_full_render_or_a_branch_that_says_why(
    formats: dict[str, ChatFormat], name: str, data: st.DataObject
) -> None:
    """Replies as the template writes them, so that the law holds for all of the ids, and of any other wording."""
    chat_format = formats[name]
    tools: tuple[Any, ...] = data.draw(st.sampled_from([(), (CALCULATOR,)]))
    conversation = Conversation(chat_format)
    history: list[dict[str, Any]] = []
    if data.draw(st.booleans()):
        history.append({"role": "system", "content": data.draw(WORDS)})
    history.append({"role": "user", "content": data.draw(WORDS)})
    exact = True
    for number in range(3):
        try:
            prompt = conversation.prompt(ChatRequest(messages=tuple(history), tools=tools))
        except TemplateError:
            assume(False)
        full = chat_format.render(history, tools)
        if prompt.branch is None:
            assert prompt.parent == (number - 1 if number else None)
        else:
            assert prompt.branch == "template"
        if prompt.branch is not None or number == 0:
            assert prompt.ids.tolist() == full
            exact = True
        elif exact:
            assert prompt.ids.tolist() == full
        said, canonical = _reply(chat_format, history, tools, data)
        exact = exact and canonical
        ids = [*said, chat_format.end_of_turn_id]
        done = completion(SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP)
        tool_format = choose_tool_format("auto", chat_format) if tools else None
        request = ChatRequest(messages=tuple(history), tools=tools)
        _, reply = ReplyBuilder(chat_format, tool_format or PlainTextFormat(), request, number).finish(done)
        conversation.answered(number, prompt, done, reply.message)
        # What was appended for the next turn is, as text, the end of its full render.
        role = "tool" if reply.tool_calls else "user"
        history = [*history, dict(reply.message), {"role": role, "content": data.draw(WORDS)}]
        whole = chat_format.rendered(history, tools)
        turn = SpokenTurn(prompt=prompt.mark, said=chat_format.decode(ids))
        appended = chat_format.continuation(whole, len(history) - 1, turn)
        if appended is not None:
            assert whole.text.startswith(chat_format.rendered(history[:-2], tools).text)
            rendered = chat_format.encode(whole)
            assert rendered[len(rendered) - len(appended) - 1 :] == [chat_format.end_of_turn_id, *appended]


def _reply(
    chat_format: ChatFormat, history: list[dict[str, Any]], tools: tuple[Any, ...], data: st.DataObject
) -> tuple[list[int], bool]:
    """Ids without their end, and whether they are the template's own for what they say."""
    if len(tools) > 0 and data.draw(st.booleans()):
        text = chat_format.spoken_text(CALL, history, tools)
        if text is not None:
            return chat_format.codec.encode(text, at_start=False)[:-1], False
    text = data.draw(st.sampled_from(["5", "It is 5.", "naïve 🙂"]) | WORDS)
    canonical = text in ("5", "It is 5.", "naïve 🙂")
    return chat_format.codec.encode(chat_format.codec.quoted_hidden(text), at_start=False), canonical


@pytest.mark.parametrize("name", NAMES)
def test_users_and_tools_cannot_spell_control_tokens(formats: dict[str, ChatFormat], name: str) -> None:
    chat_format = formats[name]
    evil = "".join(chat_format.codec._control_ids)
    controls = set(chat_format.codec._control_ids.values())
    honest = [id_ for id_ in chat_format.render([{"role": "user", "content": "x"}]) if id_ in controls]
    assert [id_ for id_ in chat_format.render([{"role": "user", "content": evil}]) if id_ in controls] == honest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tool_format_is_the_one_the_template_writes(formats: dict[str, ChatFormat], family: str) -> None:
    name = FAMILIES[family][3]
    assert choose_tool_format("auto", formats[family]) is (None if name is None else TOOL_CALL_FORMATS[name])
    assert choose_tool_format("llama3", formats[family]) is TOOL_CALL_FORMATS["llama3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_familys_own_tokenizer(formats: dict[str, ChatFormat], family: str) -> None:
    chat_format = formats[family]
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "5"}, USER]
    expected = chat_format._template._tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat_format.render(messages) == expected


@pytest.mark.parametrize(
    ("family", "said", "then", "goes_on"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\n5", USER, False),  # thinking is stripped before a new question
        ("qwen3", "5", USER, True),
        ("qwen3", "<think>\nhm\n</think>\n\nCALL", RESULT, True),  # and kept within one
        ("minimax-m2", "hm\n</think>\n\n5", USER, False),
        ("minimax-m2", "hm\n</think>\n\nCALL", RESULT, True),
        ("llama3", "CALL", RESULT, True),
        ("llama3", "<|python_tag|>CALL", RESULT, True),
        ("qwen3-coder", "CALL", RESULT, True),
        ("qwen3-coder", "Let me see.\nCALL", RESULT, True),
        ("qwen2.5", "Let me see.CALL", RESULT, True),
    ],
)
def test_families_go_on_or_branch_as_their_templates_do(
    formats: dict[str, ChatFormat], family: str, said: str, then: dict[str, Any], goes_on: bool
) -> None:
    chat_format = formats[family]
    call = chat_format.written(CALL, [USER], [CALCULATOR]).removeprefix("<think>\n\n</think>\n\n")
    request = ChatRequest(messages=(USER,), tools=(CALCULATOR,))
    conversation = Conversation(chat_format)
    prompt = conversation.prompt(request)
    ids = [*chat_format.codec.encode(said.replace("CALL", call), at_start=False), chat_format.end_of_turn_id]
    done = completion(SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP)
    tool_format = choose_tool_format("auto", chat_format)
    assert tool_format is not None
    _, reply = ReplyBuilder(chat_format, tool_format, request, 0).finish(done)
    assert len(reply.tool_calls) == ("CALL" in said)
    conversation.answered(0, prompt, done, reply.message)
    following = conversation.prompt(ChatRequest(messages=(USER, reply.message, then), tools=(CALCULATOR,)))
    assert following.branch == (None if goes_on else "template")
    known = np.concatenate([prompt.ids, ids])
    assert (following.ids[: len(known)].tolist() == known.tolist()) == goes_on


def test_a_known_turn_costs_one_render_and_no_other(formats: dict[str, ChatFormat]) -> None:
    chat_format = formats["qwen2.5"]
    first = chat_format.rendered([USER])
    prompt = chat_format.rendered([USER, {"role": "assistant", "content": "5"}, USER])
    turn = SpokenTurn(prompt=TextMark.of(first.text), said="5")
    slow = chat_format.continuation(prompt, 2)
    chat_format._template, kept = None, chat_format._template  # type: ignore[assignment]
    try:
        assert chat_format.continuation(prompt, 2, turn) == slow is not None
    finally:
        chat_format._template = kept
