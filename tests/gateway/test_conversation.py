"""Token truth, on the conversation alone.

And the boundary law: what is appended for the next turn is what a full render has after that turn, or it is a branch.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from forgejax.chat import ChatFormat
from forgejax.chat.format import SpokenTurn
from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import HermesFormat, PlainTextFormat
from forgejax.chat.tool_format import choose_tool_format
from forgejax.gateway.conversation import Conversation, Prompt
from forgejax.gateway.dialects.base import ParsedRequest, ReplyHead
from forgejax.gateway.dialects.chat_completions import ChatCompletions
from forgejax.gateway.memory import ReplyMemory
from forgejax.types import Completion, FinishReason, SampleRequest
from tests.chat.families import FAMILY_NAMES, load_families
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.fakes import completion

USER = {"role": "user", "content": "What is 2+3?"}
AGAIN = {"role": "user", "content": "And 3+4?"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "the user",
    "tool_calls": [{"type": "function", "function": {"name": "calculator", "arguments": {"b": 1, "a": "é"}}}],
}


def answer(
    conversation: Conversation, number: int, prompt: Prompt, ids: list[int], reply: Message | None
) -> Completion:
    request = SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99)
    done = completion(request, ids, FinishReason.STOP)
    conversation.add_turn(number, prompt, done, reply)
    return done


def wire(messages: list[dict[str, Any]], **fields: Any) -> ChatRequest:
    return ChatCompletions().parse({"messages": messages, **fields}, ReplyMemory()).chat


def odd_spelling(chat_format: ChatFormat, text: str) -> list[int]:
    """Ids that decode to ``text`` but are not how the tokenizer spells it: one byte each."""
    return [id_ for byte in text for id_ in chat_format.codec.encode(byte)] + [chat_format.end_of_turn_id]


def test_the_next_prompt_starts_with_the_ids_already_seen(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    sampled = odd_spelling(chat_format, "the answer is 5")
    assert sampled != chat_format.encode_assistant({"role": "assistant", "content": "the answer is 5"})
    first = conversation.make_prompt(ChatRequest(messages=(USER,)))
    answer(conversation, 0, first, sampled, {"role": "assistant", "content": "the answer is 5"})
    messages = (USER, {"role": "assistant", "content": "the answer is 5"}, AGAIN)
    second = conversation.make_prompt(ChatRequest(messages=messages))
    known = first.ids.tolist() + sampled
    assert second.ids[: len(known)].tolist() == known
    assert chat_format.decode(second.ids) == chat_format.decode(chat_format.render(messages))
    assert (second.parent, second.branch) == (0, None)


def test_a_reply_that_was_cut_short_gets_the_end_it_never_drew(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    spoken = {"role": "assistant", "content": "the ans"}
    sampled = odd_spelling(chat_format, "the ans")[:-1]
    first = conversation.make_prompt(ChatRequest(messages=(USER,)))
    answer(conversation, 0, first, sampled, spoken)
    second = conversation.make_prompt(ChatRequest(messages=(USER, spoken, AGAIN)))
    at = len(first.ids) + len(sampled)
    assert second.ids[at] == chat_format.end_of_turn_id
    tail = chat_format.render([USER, spoken, AGAIN])
    assert second.ids[at:].tolist() == tail[-(len(second.ids) - at) :]


@pytest.mark.parametrize(
    "echo",
    [
        {"content": "the user", "refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"content": [{"type": "text", "text": "the user"}]},
        {"content": "  the user\n"},
    ],
)
@pytest.mark.parametrize("arguments", ['{"b":1,"a":"é"}', '{ "a": "\\u00e9", "b": 1 }'])
def test_an_echo_that_means_the_same_goes_on(chat_format: ChatFormat, echo: dict[str, Any], arguments: str) -> None:
    conversation = Conversation(chat_format)
    prompt = conversation.make_prompt(wire([USER], tools=[CALCULATOR]))
    done = answer(conversation, 0, prompt, odd_spelling(chat_format, "the user"), CALL)
    call = {"id": "other", "type": "function", "function": {"arguments": arguments, "name": "calculator"}}
    history = [USER, {"role": "assistant", "tool_calls": [call], **echo}, {"role": "tool", "content": "5"}]
    following = conversation.make_prompt(wire(history, tools=[CALCULATOR]))
    known = np.concatenate([done.prompt_ids, done.token_ids])
    assert following.parent == 0 and following.ids[: len(known)].tolist() == known.tolist()


@pytest.mark.parametrize(
    "change",
    ["another answer", "another argument", "no call", "edited question", "other tools", "no tools"],
)
def test_another_history_is_a_branch(chat_format: ChatFormat, change: str) -> None:
    conversation = Conversation(chat_format)
    prompt = conversation.make_prompt(ChatRequest(messages=(USER,), tools=(CALCULATOR,)))
    answer(conversation, 0, prompt, odd_spelling(chat_format, "the user"), CALL)
    function = {"name": "calculator", "arguments": {"a": "é", "b": 2 if change == "another argument" else 1}}
    call: dict[str, Any] = {
        "role": "assistant",
        "content": "Ha." if change == "another answer" else "the user",
        "tool_calls": [] if change == "no call" else [{"type": "function", "function": function}],
    }
    other = {"type": "function", "function": {**CALCULATOR["function"], "description": "Other."}}
    tools = {"other tools": (other,), "no tools": ()}.get(change, (CALCULATOR,))
    messages = (AGAIN if change == "edited question" else USER, call, {"role": "tool", "content": "5"})
    branch = conversation.make_prompt(ChatRequest(messages=messages, tools=tools))
    assert (branch.parent, branch.branch) == (None, "history")
    assert branch.ids.tolist() == chat_format.render(messages, tools)


def test_a_retry_of_a_step_has_the_same_parent_and_the_same_prompt(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    spoken = {"role": "assistant", "content": "the user"}
    answer(
        conversation,
        0,
        conversation.make_prompt(ChatRequest(messages=(USER,))),
        odd_spelling(chat_format, "the user"),
        spoken,
    )
    step = ChatRequest(messages=(USER, spoken, AGAIN))
    first = conversation.make_prompt(step)
    answer(conversation, 1, first, odd_spelling(chat_format, "7"), {"role": "assistant", "content": "7"})
    retry = conversation.make_prompt(step)
    assert first.parent == retry.parent == 0 and first.ids.tolist() == retry.ids.tolist()


def test_a_branch_whose_ids_still_begin_with_a_turn_has_that_turn_as_parent(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    spoken = {"role": "assistant", "content": "the user"}
    first = conversation.make_prompt(ChatRequest(messages=(USER,)))
    # The agent never got the reply (so no history matches), yet it says the same words itself.
    answer(conversation, 0, first, chat_format.encode_assistant(spoken), None)
    second = conversation.make_prompt(ChatRequest(messages=(USER, spoken, AGAIN)))
    assert (second.parent, second.branch) == (0, "history")


def test_whatever_ids_are_drawn_the_episode_goes_on_from_them(chat_format: ChatFormat) -> None:
    """Random ids: broken UTF-8, control tokens, half tool calls, replies cut short or stopped by a string."""
    draw = random.Random(1)
    markers = [chat_format.codec.find_control_id(marker) for marker in ("<tool_call>", "</tool_call>", "<|im_start|>")]
    for _ in range(40):
        conversation = Conversation(chat_format)
        history: list[dict[str, Any]] = [USER]
        known: list[int] = []
        for number in range(5):
            request = wire(history, tools=[CALCULATOR], stop=draw.choice([None, "q"]))
            prompt = conversation.make_prompt(request)
            assert prompt.ids[: len(known)].tolist() == known
            assert (prompt.parent, prompt.branch) == (number - 1 if number else None, None)
            ids = [draw.choice([draw.randrange(300), *markers]) for _ in range(draw.randrange(1, 12))]
            ids += draw.choice([[], [chat_format.end_of_turn_id]])
            builder = ReplyBuilder(chat_format, HermesFormat(), request, number)
            done = completion(
                SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP
            )
            _, reply = builder.finish(done)
            conversation.add_turn(number, prompt, done, reply.message)
            known = prompt.ids.tolist() + ids
            head = ReplyHead(id="c", created=0, model="m")
            asked = ParsedRequest(chat=request, stream=False, body={})
            echo = json.loads(json.dumps(ChatCompletions().response(head, asked, reply)))["choices"][0]["message"]
            history = [*history, echo, {"role": draw.choice(["user", "tool"]), "content": "go <|im_end|> on"}]


RESULT = {"role": "tool", "content": "5"}
SUM_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}],
}


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatFormat]:
    return load_families(tmp_path_factory.mktemp("families"))


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


@pytest.mark.parametrize("name", FAMILY_NAMES)
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
            prompt = conversation.make_prompt(ChatRequest(messages=tuple(history), tools=tools))
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
        conversation.add_turn(number, prompt, done, reply.message)
        # What was appended for the next turn is, as text, the end of its full render.
        role = "tool" if reply.tool_calls else "user"
        history = [*history, dict(reply.message), {"role": role, "content": data.draw(WORDS)}]
        whole = chat_format.render_text(history, tools)
        turn = SpokenTurn(prompt=prompt.mark, said=chat_format.decode(ids))
        appended = chat_format.continue_turn(whole, len(history) - 1, turn)
        if appended is not None:
            assert whole.text.startswith(chat_format.render_text(history[:-2], tools).text)
            rendered = chat_format.encode(whole)
            assert rendered[len(rendered) - len(appended) - 1 :] == [chat_format.end_of_turn_id, *appended]


def _reply(
    chat_format: ChatFormat, history: list[dict[str, Any]], tools: tuple[Any, ...], data: st.DataObject
) -> tuple[list[int], bool]:
    """Ids without their end, and whether they are the template's own for what they say."""
    if len(tools) > 0 and data.draw(st.booleans()):
        text = chat_format.render_spoken(SUM_CALL, history, tools)
        if text is not None:
            return chat_format.codec.encode(text, at_start=False)[:-1], False
    text = data.draw(st.sampled_from(["5", "It is 5.", "naïve 🙂"]) | WORDS)
    canonical = text in ("5", "It is 5.", "naïve 🙂")
    return chat_format.codec.encode(chat_format.codec.quote_hidden(text), at_start=False), canonical


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
    call = chat_format.render_message(SUM_CALL, [USER], [CALCULATOR]).removeprefix("<think>\n\n</think>\n\n")
    request = ChatRequest(messages=(USER,), tools=(CALCULATOR,))
    conversation = Conversation(chat_format)
    prompt = conversation.make_prompt(request)
    ids = [*chat_format.codec.encode(said.replace("CALL", call), at_start=False), chat_format.end_of_turn_id]
    done = completion(SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP)
    tool_format = choose_tool_format("auto", chat_format)
    assert tool_format is not None
    _, reply = ReplyBuilder(chat_format, tool_format, request, 0).finish(done)
    assert len(reply.tool_calls) == ("CALL" in said)
    conversation.add_turn(0, prompt, done, reply.message)
    following = conversation.make_prompt(ChatRequest(messages=(USER, reply.message, then), tools=(CALCULATOR,)))
    assert following.branch == (None if goes_on else "template")
    known = np.concatenate([prompt.ids, ids])
    assert (following.ids[: len(known)].tolist() == known.tolist()) == goes_on
