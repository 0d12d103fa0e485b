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
from forgejax.chat.messages import ChatRequest, Message, MessagePart, ReasoningPart, TextPart, Tool, read_call
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import HermesFormat, PlainTextFormat
from forgejax.chat.tool_format import choose_tool_format
from forgejax.gateway.dialects.base import ParsedRequest, ReplyHead
from forgejax.gateway.dialects.chat_completions import ChatCompletions
from forgejax.gateway.history.conversation import Conversation, Prompt
from forgejax.gateway.memory import ReplyMemory
from forgejax.types import Completion, FinishReason, SampleRequest
from tests.chat.families import FAMILY_NAMES, load_families
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.fakes import completion

USER = Message.of_text("user", "What is 2+3?")
AGAIN = Message.of_text("user", "And 3+4?")
RESULT = Message.of_text("tool", "5")


def say(text: str, *parts: MessagePart) -> Message:
    return Message(role="assistant", parts=(TextPart(text=text), *parts))


CALL = say("the user", read_call("calculator", '{"b": 1, "a": "é"}', "call_00000000"))
SPOKEN = say("the user")


def make_prompt(conversation: Conversation, *messages: Message, tools: tuple[Tool, ...] = ()) -> Prompt:
    return conversation.make_prompt(conversation.locate(ChatRequest(messages=messages, tools=tools)))


def render(chat_format: ChatFormat, *messages: Message, tools: tuple[Tool, ...] = ()) -> list[int]:
    return chat_format.encode(chat_format.render_chat(messages, tools))


def answer(
    conversation: Conversation,
    number: int,
    prompt: Prompt,
    ids: list[int],
    reply: Message | None,
) -> Completion:
    request = SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99)
    done = completion(request, ids, FinishReason.STOP)
    conversation.add_turn(number, prompt, done, reply, f"turn-{number}")
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
    first = make_prompt(conversation, USER)
    answer(conversation, 0, first, sampled, say("the answer is 5"))
    messages = (USER, say("the answer is 5"), AGAIN)
    second = make_prompt(conversation, *messages)
    known = first.ids.tolist() + sampled
    assert second.ids[: len(known)].tolist() == known
    assert chat_format.decode(second.ids) == chat_format.decode(render(chat_format, *messages))
    assert (second.parent, second.branch) == (0, None)


def test_a_reply_that_was_cut_short_gets_the_end_it_never_drew(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    sampled = odd_spelling(chat_format, "the ans")[:-1]
    first = make_prompt(conversation, USER)
    answer(conversation, 0, first, sampled, say("the ans"))
    second = make_prompt(conversation, USER, say("the ans"), AGAIN)
    at = len(first.ids) + len(sampled)
    assert second.ids[at] == chat_format.end_of_turn_id
    tail = render(chat_format, USER, say("the ans"), AGAIN)
    assert second.ids[at:].tolist() == tail[-(len(second.ids) - at) :]


QUESTION = {"role": "user", "content": "What is 2+3?"}


@pytest.mark.parametrize(
    "echo",
    [
        {"content": "the user", "refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"content": [{"type": "text", "text": "the user"}]},
        {"content": "  the user\n"},
    ],
)
@pytest.mark.parametrize("arguments", ['{"b":1,"a":"é"}', '{ "a": "\\u00e9", "b": 1.0 }'])
def test_an_echo_that_means_the_same_goes_on(chat_format: ChatFormat, echo: dict[str, Any], arguments: str) -> None:
    conversation = Conversation(chat_format)
    prompt = make_prompt(conversation, USER, tools=(CALCULATOR,))
    done = answer(conversation, 0, prompt, odd_spelling(chat_format, "the user"), CALL)
    call = {"id": "other", "type": "function", "function": {"arguments": arguments, "name": "calculator"}}
    history = [QUESTION, {"role": "assistant", "tool_calls": [call], **echo}, {"role": "tool", "content": "5"}]
    following = conversation.make_prompt(conversation.locate(wire(history, tools=[CALCULATOR])))
    known = np.concatenate([done.prompt_ids, done.token_ids])
    assert following.parent == 0 and following.ids[: len(known)].tolist() == known.tolist()


@pytest.mark.parametrize(
    "change",
    ["another answer", "another argument", "no call", "two calls", "edited question", "other tools", "no tools"],
)
@pytest.mark.parametrize("id_", [None, "call_00000000"])
def test_another_history_is_a_branch(chat_format: ChatFormat, change: str, id_: str | None) -> None:
    conversation = Conversation(chat_format)
    prompt = make_prompt(conversation, USER, tools=(CALCULATOR,))
    answer(conversation, 0, prompt, odd_spelling(chat_format, "the user"), CALL)
    call = read_call("calculator", '{"b": 2, "a": "é"}' if change == "another argument" else '{"b": 1, "a": "é"}', id_)
    calls = {"no call": (), "two calls": (call, call)}.get(change, (call,))
    other = {"type": "function", "function": {**CALCULATOR["function"], "description": "Other."}}
    tools: tuple[Tool, ...] = {"other tools": (other,), "no tools": ()}.get(change, (CALCULATOR,))
    asked = AGAIN if change == "edited question" else USER
    messages = (asked, say("Ha." if change == "another answer" else "the user", *calls), RESULT)
    branch = make_prompt(conversation, *messages, tools=tools)
    assert (branch.parent, branch.branch) == (None, "history")
    assert branch.ids.tolist() == render(chat_format, *messages, tools=tools)


def test_a_retry_of_a_step_has_the_same_parent_and_the_same_prompt(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    answer(conversation, 0, make_prompt(conversation, USER), odd_spelling(chat_format, "the user"), SPOKEN)
    first = make_prompt(conversation, USER, SPOKEN, AGAIN)
    answer(conversation, 1, first, odd_spelling(chat_format, "7"), say("7"))
    retry = make_prompt(conversation, USER, SPOKEN, AGAIN)
    assert first.parent == retry.parent == 0 and first.ids.tolist() == retry.ids.tolist()


def test_a_branch_whose_ids_still_begin_with_a_turn_has_that_turn_as_parent(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    first = make_prompt(conversation, USER)
    # The agent never got the reply (so no history matches), yet it says the same words itself.
    said = chat_format.encode_assistant({"role": "assistant", "content": "the user"})
    answer(conversation, 0, first, said, None)
    second = make_prompt(conversation, USER, SPOKEN, AGAIN)
    assert (second.parent, second.branch) == (0, "history")


def test_the_parent_is_fixed_when_the_request_arrives(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    first = make_prompt(conversation, USER)
    spelled = chat_format.encode_assistant({"role": "assistant", "content": "the user"})
    located = conversation.locate(ChatRequest(messages=(USER, SPOKEN, AGAIN)))
    answer(conversation, 5, first, spelled, SPOKEN)  # arrives while the prompt is made
    assert (conversation.make_prompt(located).parent, conversation.make_prompt(located).branch) == (None, None)
    assert make_prompt(conversation, USER, SPOKEN, AGAIN).parent == 5


def test_twins_are_told_apart_by_ids_and_signatures_and_never_by_text_alone(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    first = make_prompt(conversation, USER, tools=(CALCULATOR,))
    spellings = (
        odd_spelling(chat_format, "the user"),
        chat_format.encode_assistant({"role": "assistant", "content": "the user"}),
    )
    for number, ids in enumerate(spellings):
        call = read_call("calculator", "{}", f"call_{number}")
        said = (ReasoningPart(text="hm", signature=f"turn-{number}"), TextPart(text="the user"), call)
        answer(conversation, number, first, ids, Message(role="assistant", parts=said))
    for number in range(2):
        by_id = make_prompt(
            conversation,
            USER,
            say("the user", read_call("calculator", "", f"call_{number}")),
            RESULT,
            tools=(CALCULATOR,),
        )
        unread = (ReasoningPart(text="", signature=f"turn-{number}"), read_call("calculator", "{}"))
        by_signature = make_prompt(
            conversation, USER, Message(role="assistant", parts=unread), RESULT, tools=(CALCULATOR,)
        )
        assert (by_id.parent, by_signature.parent) == (number, number)
        assert by_id.ids.tolist() == by_signature.ids.tolist()
    text_alone = make_prompt(
        conversation, USER, say("the user", read_call("calculator", "")), RESULT, tools=(CALCULATOR,)
    )
    assert (text_alone.parent, text_alone.branch) == (None, "twins")
    # What only one of the twins was followed by tells which it was.
    answer(conversation, 2, by_id, odd_spelling(chat_format, "seven"), say("seven"))
    later = make_prompt(
        conversation,
        USER,
        say("the user", read_call("calculator", "")),
        RESULT,
        say("seven"),
        AGAIN,
        tools=(CALCULATOR,),
    )
    assert (later.parent, later.branch) == (2, None)


def test_twins_that_are_the_same_ids_are_one(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    first = make_prompt(conversation, USER)
    answer(conversation, 0, first, odd_spelling(chat_format, "the user"), SPOKEN)
    following = make_prompt(conversation, USER, SPOKEN, AGAIN)
    answer(conversation, 1, following, odd_spelling(chat_format, "7"), say("7"))
    answer(conversation, 2, first, odd_spelling(chat_format, "the user"), SPOKEN)
    assert make_prompt(conversation, USER, SPOKEN, USER).parent == 0
    assert make_prompt(conversation, USER, SPOKEN, AGAIN, say("7"), USER).parent == 1


def test_whatever_ids_are_drawn_the_episode_goes_on_from_them(chat_format: ChatFormat) -> None:
    """Random ids: broken UTF-8, control tokens, half tool calls, replies cut short or stopped by a string."""
    draw = random.Random(1)
    markers = [chat_format.codec.find_control_id(marker) for marker in ("<tool_call>", "</tool_call>", "<|im_start|>")]
    for _ in range(40):
        conversation = Conversation(chat_format)
        history: list[dict[str, Any]] = [QUESTION]
        known: list[int] = []
        for number in range(5):
            request = wire(history, tools=[CALCULATOR], stop=draw.choice([None, "q"]))
            prompt = conversation.make_prompt(conversation.locate(request))
            assert prompt.ids[: len(known)].tolist() == known
            assert (prompt.parent, prompt.branch) == (number - 1 if number else None, None)
            ids = [draw.choice([draw.randrange(300), *markers]) for _ in range(draw.randrange(1, 12))]
            ids += draw.choice([[], [chat_format.end_of_turn_id]])
            builder = ReplyBuilder(chat_format, HermesFormat(), request, number=number, signature=f"turn-{number}")
            done = completion(
                SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP
            )
            _, reply = builder.finish(done)
            conversation.add_turn(number, prompt, done, reply.message, reply.signature)
            known = prompt.ids.tolist() + ids
            head = ReplyHead(id="c", created=0, model="m")
            asked = ParsedRequest(chat=request, stream=False, body={})
            echo = json.loads(json.dumps(ChatCompletions().response(head, asked, reply)))["choices"][0]["message"]
            history = [*history, echo, {"role": draw.choice(["user", "tool"]), "content": "go <|im_end|> on"}]


SUM = Message(role="assistant", parts=(read_call("calculator", '{"expression": "2+3"}'),))


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
    history: list[Message] = []
    if data.draw(st.booleans()):
        history.append(Message.of_text("system", data.draw(WORDS)))
    history.append(Message.of_text("user", data.draw(WORDS)))
    exact = True
    for number in range(3):
        try:
            prompt = make_prompt(conversation, *history, tools=tools)
        except TemplateError:
            assume(False)
        full = render(chat_format, *history, tools=tools)
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
        tool_format = (choose_tool_format("auto", chat_format) if tools else None) or PlainTextFormat()
        request = ChatRequest(messages=tuple(history), tools=tools)
        builder = ReplyBuilder(
            chat_format, tool_format, request, number=number, signature=f"turn-{number}", thinking=prompt.thinking
        )
        _, reply = builder.finish(done)
        conversation.add_turn(number, prompt, done, reply.message, reply.signature)
        # What was appended for the next turn is, as text, the end of its full render.
        role: Any = "tool" if reply.message.tool_calls else "user"
        history = [*history, reply.message, Message.of_text(role, data.draw(WORDS))]
        whole = chat_format.render_chat(history, tools)
        turn = SpokenTurn(before=prompt.before, said=chat_format.decode(ids), thought=reply.message.reasoning)
        appended = chat_format.continue_turn(whole, len(history) - 1, turn)
        if appended is not None:
            rendered = chat_format.encode(whole)
            assert rendered[len(rendered) - len(appended) - 1 :] == [chat_format.end_of_turn_id, *appended]


def _reply(
    chat_format: ChatFormat, history: list[Message], tools: tuple[Any, ...], data: st.DataObject
) -> tuple[list[int], bool]:
    """Ids without their end, and whether they are the template's own for what they say, now and later."""
    if len(tools) > 0 and data.draw(st.booleans()):
        before = [chat_format.thoughts.spell(message) for message in history]
        text = chat_format.render_spoken(chat_format.thoughts.spell(SUM), before, tools)
        if text is not None:
            return chat_format.codec.encode(text, at_start=False)[:-1], False
    text = data.draw(st.sampled_from(["5", "It is 5.", "naïve 🙂"]) | WORDS)
    canonical = text in ("5", "It is 5.", "naïve 🙂") and not chat_format.thoughts.opens(
        chat_format.render_chat(history, tools).text
    )
    return chat_format.codec.encode(chat_format.codec.quote_hidden(text), at_start=False), canonical


@pytest.mark.parametrize(
    ("family", "said", "then", "goes_on"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\n5", USER, False),  # thinking is stripped before a new question
        ("qwen3", "<think>\nhm\n</think>\n\nCALL", RESULT, True),  # and kept within one
        ("qwen3", "<think>\n\n</think>\n\n5", USER, True),  # an empty thought is none
        ("qwen3", "5", USER, True),
        ("qwen3", "I look.\n\n\nCALL", RESULT, True),
        ("qwen3", "CALLCALL", RESULT, True),
        ("minimax-m2", "hm\n</think>\n\n5", USER, False),
        ("minimax-m2", "hm\n</think>\n\nCALL", RESULT, True),
        ("minimax-m2", "\n</think>\n\nCALL", RESULT, True),
        ("llama3", "CALL", RESULT, True),
        ("llama3", "<|python_tag|>CALL", RESULT, True),
        ("qwen3-coder", "CALL", RESULT, True),
        ("qwen3-coder", "Let me see.\nCALL", RESULT, True),
        ("qwen2.5", "Let me see.CALL", RESULT, True),
        ("qwen2.5", "<think>\nhm</think>Let me see.CALL", RESULT, True),
    ],
)
def test_families_go_on_or_branch_as_their_templates_do_whatever_becomes_of_the_thought(
    formats: dict[str, ChatFormat], family: str, said: str, then: Message, goes_on: bool
) -> None:
    chat_format = formats[family]
    asked = [chat_format.thoughts.spell(USER)]
    call = chat_format.render_message(chat_format.thoughts.spell(SUM), asked, [CALCULATOR])
    call = call.removeprefix("<think>\n\n</think>\n\n")
    conversation = Conversation(chat_format)
    request = ChatRequest(messages=(USER,), tools=(CALCULATOR,))
    prompt = conversation.make_prompt(conversation.locate(request))
    ids = [*chat_format.codec.encode(said.replace("CALL", call), at_start=False), chat_format.end_of_turn_id]
    done = completion(SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP)
    tool_format = choose_tool_format("auto", chat_format)
    assert tool_format is not None
    builder = ReplyBuilder(chat_format, tool_format, request, number=0, signature="turn-0", thinking=prompt.thinking)
    _, reply = builder.finish(done)
    assert len(reply.message.tool_calls) == said.count("CALL") and bool(reply.message.reasoning) == ("hm" in said)
    conversation.add_turn(0, prompt, done, reply.message, reply.signature)
    others = tuple(p for p in reply.message.parts if not isinstance(p, ReasoningPart | TextPart))
    for thought in (None, "", f"<think>{reply.message.reasoning}</think>"):  # kept, dropped, put into the text
        back = reply.message
        if thought is not None:
            back = Message(role="assistant", parts=(TextPart(text=f"{thought}{back.text}"), *others))
        following = make_prompt(conversation, USER, back, then, tools=(CALCULATOR,))
        assert following.branch == (None if goes_on else "template")
        known = np.concatenate([prompt.ids, ids])
        assert (following.ids[: len(known)].tolist() == known.tolist()) == goes_on
