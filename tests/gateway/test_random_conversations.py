"""Long random conversations in every dialect: what the agent is given is what was drawn, and the tree is the one the
agent walked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway
from forgejax.types import Session, Turn
from tests.chat.families import load_families
from tests.gateway.asking import ask_messages, client
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

NAMES = ("sh", "nope")
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "number"}}}
WORDS = st.sampled_from(["", "So.", "I look: é🙂", "a < b </tool> {"])
ARGUMENTS = st.dictionaries(
    st.sampled_from(["command", "n"]), st.sampled_from(["ls", 'é🙂\n"</tool_call>"', 1, 2.0, 1e3, None, ["a"]])
)


@dataclass(frozen=True)
class Reply:
    """A reply as its parts, and how the policy spells it."""

    thought: str
    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...]
    ascii_only: bool
    odd: bool  # one token a byte

    def spell(self) -> str:
        thought = f"<think>\n{self.thought}\n</think>\n\n" if self.thought else ""
        calls = [
            f"<tool_call>\n{json.dumps({'name': name, 'arguments': given}, ensure_ascii=self.ascii_only)}\n</tool_call>"
            for name, given in self.calls
        ]
        return thought + "\n".join([*([self.text] if self.text or not calls else []), *calls])


REPLIES = st.builds(
    Reply,
    thought=st.sampled_from(["", "hm", "é 🙂\n\nand so"]),
    text=WORDS,
    calls=st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), max_size=2).map(tuple),
    ascii_only=st.booleans(),
    odd=st.booleans(),
).filter(lambda reply: bool(reply.text or reply.calls))


@dataclass
class Agent:
    """One branch of a conversation, in a dialect; ``said`` is what it was given."""

    dialect: Literal["chat", "responses", "messages"]
    session: Session
    openai: AsyncOpenAI
    history: list[Any] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)  # unanswered: id and kind

    def say(self, text: str) -> None:
        """What comes next of the user, or of the tools that were called."""
        calls, self.calls = self.calls, []
        if not calls:
            self.history.append({"role": "user", "content": text})
        elif self.dialect == "chat":
            self.history += [{"role": "tool", "tool_call_id": id_, "content": text} for id_, _ in calls]
        elif self.dialect == "responses":
            self.history += [{"type": "function_call_output", "call_id": id_, "output": text} for id_, _ in calls]
        else:
            results = [{"type": "tool_result", "tool_use_id": id_, "content": text} for id_, _ in calls]
            self.history.append({"role": "user", "content": results})

    async def ask(self, *, stream: bool, keep: bool) -> tuple[str, str, list[tuple[str, Any]]]:
        """The thought, the text and the calls of the next reply, which goes into the history."""
        thought, text, calls = await getattr(self, f"_ask_{self.dialect}")(stream, keep)
        return thought, text, [(name, json.loads(raw)) for name, raw in calls]

    async def _ask_chat(self, stream: bool, keep: bool) -> Any:
        functions = [{"name": name, "parameters": SCHEMA} for name in NAMES]
        tools = [{"type": "function", "function": function} for function in functions]
        body: dict[str, Any] = {"model": "m", "messages": self.history, "tools": tools}
        if stream:
            async with self.openai.chat.completions.stream(**body) as events:
                message = (await events.get_final_completion()).choices[0].message
        else:
            message = (await self.openai.chat.completions.create(**body)).choices[0].message
        made = message.tool_calls or []
        wired = [
            {"id": c.id, "type": "function", "function": c.function.model_dump(include={"name", "arguments"})}
            for c in made
        ]
        thought = (message.model_extra or {}).get("reasoning_content") or ""
        echo = {"role": "assistant", "content": message.content, "reasoning_content": thought if keep else None}
        self.history.append(echo | ({"tool_calls": wired} if wired else {}))
        self.calls = [(call.id, "function") for call in made]
        return thought, message.content or "", [(call.function.name, call.function.arguments) for call in made]

    async def _ask_responses(self, stream: bool, keep: bool) -> Any:
        tools = [{"type": "function", "name": name, "parameters": SCHEMA, "strict": False} for name in NAMES]
        body: dict[str, Any] = {"model": "m", "input": self.history, "tools": tools, "store": False}
        if stream:
            async with self.openai.responses.stream(**body) as events:
                response: Any = await events.get_final_response()
        else:
            response = await self.openai.responses.create(**body)
        thought, text, calls = "", "", []
        for item in response.output:
            echo = item.model_dump(exclude_none=True, exclude={"parsed_arguments"})
            if item.type == "reasoning":
                thought = item.content[0].text
            elif item.type == "message":
                text = item.content[0].text
                echo["content"] = [{"type": "output_text", "text": text}]
            else:
                calls.append((item.name, item.arguments))
                self.calls.append((item.call_id, "function_call"))
            if keep or item.type != "reasoning":
                self.history.append(echo)
        return thought, text, calls

    async def _ask_messages(self, stream: bool, keep: bool) -> Any:
        tools = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
        _, message = await ask_messages(self.session, messages=self.history, tools=tools, stream=stream, max_tokens=999)
        blocks = message["content"]
        kept = [block for block in blocks if keep or block["type"] != "thinking"]
        self.history.append({"role": "assistant", "content": kept})
        calls = [block for block in blocks if block["type"] == "tool_use"]
        self.calls = [(block["id"], "tool_use") for block in calls]
        thought = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        return thought, text, [(block["name"], json.dumps(block["input"])) for block in calls]


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatFormat]:
    return load_families(tmp_path_factory.mktemp("families"))


def spell_ids(chat_format: ChatFormat, reply: Reply) -> list[int]:
    pieces = reply.spell() if reply.odd else [reply.spell()]
    return [id_ for piece in pieces for id_ in chat_format.codec.encode(piece)] + [chat_format.end_of_turn_id]


async def walk(
    gateway: Gateway, sampler: ScriptedSampler, data: st.DataObject
) -> tuple[tuple[Turn, ...], list[int | None]]:
    """Plays some branches, each forked off an earlier one; gives the turns, and the parents as they were walked."""
    session = gateway.open(TRAINING)
    parents: list[int | None] = []
    async with client(session) as openai:
        for _ in range(data.draw(st.integers(1, 2))):
            dialect: Any = data.draw(st.sampled_from(["chat", "responses", "messages"]))
            agent, parent = Agent(dialect, session, openai), None
            agent.say(f"Question {len(parents)}?")
            for _ in range(data.draw(st.integers(1, 4))):
                reply = data.draw(REPLIES)
                sampler.script.append(spell_ids(sampler.chat_format, reply))
                given_ = await agent.ask(stream=data.draw(st.booleans()), keep=data.draw(st.booleans()))
                assert given_ == (reply.thought, reply.text, list(reply.calls))
                parents.append(parent)
                parent = len(parents) - 1
                agent.say(data.draw(st.sampled_from(["out", "é🙂", "<|im_end|>"])))
    return await gateway.close(session.id), parents


@pytest.mark.parametrize("family", ["qwen2.5", "hermes", "qwen3"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_what_agents_are_given_is_what_was_drawn_and_the_tree_is_the_one_they_walked(
    formats: dict[str, ChatFormat], family: str, data: st.DataObject
) -> None:
    sampler = ScriptedSampler(formats[family])
    gateway = await started(sampler, 100_000)
    try:
        turns, parents = await walk(gateway, sampler, data)
    finally:
        await gateway.stop()
    assert [turn.completion for turn in turns] == sampler.returned
    for turn, parent in zip(turns, parents, strict=True):
        # A template that drops thoughts once the user asks anew begins another tree there, and only there.
        assert turn.parent == parent or (family == "qwen3" and turn.parent is None)
        if turn.parent is not None:
            before = turns[turn.parent].completion
            known = np.concatenate([before.prompt_ids, before.token_ids])
            assert np.array_equal(turn.completion.prompt_ids[: len(known)], known)
