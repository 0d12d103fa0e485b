"""Token truth, on the conversation alone."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.tool_calls import HermesFormat
from forgejax.gateway.conversation import Conversation, Prompt
from forgejax.gateway.dialects.base import ParsedRequest, ReplyHead
from forgejax.gateway.dialects.chat_completions import ChatCompletions
from forgejax.gateway.memory import ReplyMemory
from forgejax.types import Completion, FinishReason, SampleRequest
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
    conversation.answered(number, prompt, done, reply)
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
    first = conversation.prompt(ChatRequest(messages=(USER,)))
    answer(conversation, 0, first, sampled, {"role": "assistant", "content": "the answer is 5"})
    messages = (USER, {"role": "assistant", "content": "the answer is 5"}, AGAIN)
    second = conversation.prompt(ChatRequest(messages=messages))
    known = first.ids.tolist() + sampled
    assert second.ids[: len(known)].tolist() == known
    assert chat_format.decode(second.ids) == chat_format.decode(chat_format.render(messages))
    assert (second.parent, second.branch) == (0, None)


def test_a_reply_that_was_cut_short_gets_the_end_it_never_drew(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    spoken = {"role": "assistant", "content": "the ans"}
    sampled = odd_spelling(chat_format, "the ans")[:-1]
    first = conversation.prompt(ChatRequest(messages=(USER,)))
    answer(conversation, 0, first, sampled, spoken)
    second = conversation.prompt(ChatRequest(messages=(USER, spoken, AGAIN)))
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
    prompt = conversation.prompt(wire([USER], tools=[CALCULATOR]))
    done = answer(conversation, 0, prompt, odd_spelling(chat_format, "the user"), CALL)
    call = {"id": "other", "type": "function", "function": {"arguments": arguments, "name": "calculator"}}
    history = [USER, {"role": "assistant", "tool_calls": [call], **echo}, {"role": "tool", "content": "5"}]
    following = conversation.prompt(wire(history, tools=[CALCULATOR]))
    known = np.concatenate([done.prompt_ids, done.token_ids])
    assert following.parent == 0 and following.ids[: len(known)].tolist() == known.tolist()


@pytest.mark.parametrize(
    "change",
    ["another answer", "another argument", "no call", "edited question", "other tools", "no tools"],
)
def test_another_history_is_a_branch(chat_format: ChatFormat, change: str) -> None:
    conversation = Conversation(chat_format)
    prompt = conversation.prompt(ChatRequest(messages=(USER,), tools=(CALCULATOR,)))
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
    branch = conversation.prompt(ChatRequest(messages=messages, tools=tools))
    assert (branch.parent, branch.branch) == (None, "history")
    assert branch.ids.tolist() == chat_format.render(messages, tools)


def test_a_retry_of_a_step_has_the_same_parent_and_the_same_prompt(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    spoken = {"role": "assistant", "content": "the user"}
    answer(
        conversation,
        0,
        conversation.prompt(ChatRequest(messages=(USER,))),
        odd_spelling(chat_format, "the user"),
        spoken,
    )
    step = ChatRequest(messages=(USER, spoken, AGAIN))
    first = conversation.prompt(step)
    answer(conversation, 1, first, odd_spelling(chat_format, "7"), {"role": "assistant", "content": "7"})
    retry = conversation.prompt(step)
    assert first.parent == retry.parent == 0 and first.ids.tolist() == retry.ids.tolist()


def test_a_branch_whose_ids_still_begin_with_a_turn_has_that_turn_as_parent(chat_format: ChatFormat) -> None:
    conversation = Conversation(chat_format)
    spoken = {"role": "assistant", "content": "the user"}
    first = conversation.prompt(ChatRequest(messages=(USER,)))
    # The agent never got the reply (so no history matches), yet it says the same words itself.
    answer(conversation, 0, first, chat_format.encode_assistant(spoken), None)
    second = conversation.prompt(ChatRequest(messages=(USER, spoken, AGAIN)))
    assert (second.parent, second.branch) == (0, "history")


def test_whatever_ids_are_drawn_the_episode_goes_on_from_them(chat_format: ChatFormat) -> None:
    """Random ids: broken UTF-8, control tokens, half tool calls, replies cut short or stopped by a string."""
    draw = random.Random(1)
    markers = [chat_format.codec.control_id(marker) for marker in ("<tool_call>", "</tool_call>", "<|im_start|>")]
    for _ in range(40):
        conversation = Conversation(chat_format)
        history: list[dict[str, Any]] = [USER]
        known: list[int] = []
        for number in range(5):
            request = wire(history, tools=[CALCULATOR], stop=draw.choice([None, "q"]))
            prompt = conversation.prompt(request)
            assert prompt.ids[: len(known)].tolist() == known
            assert (prompt.parent, prompt.branch) == (number - 1 if number else None, None)
            ids = [draw.choice([draw.randrange(300), *markers]) for _ in range(draw.randrange(1, 12))]
            ids += draw.choice([[], [chat_format.end_of_turn_id]])
            builder = ReplyBuilder(chat_format, HermesFormat(), request, number)
            done = completion(
                SampleRequest(request_id="r", prompt_ids=prompt.ids, max_tokens=99), ids, FinishReason.STOP
            )
            _, reply = builder.finish(done)
            conversation.answered(number, prompt, done, reply.message)
            known = prompt.ids.tolist() + ids
            head = ReplyHead(id="c", created=0, model="m")
            asked = ParsedRequest(chat=request, stream=False, body={})
            echo = json.loads(json.dumps(ChatCompletions().response(head, asked, reply)))["choices"][0]["message"]
            history = [*history, echo, {"role": draw.choice(["user", "tool"]), "content": "go <|im_end|> on"}]
