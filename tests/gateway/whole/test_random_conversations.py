"""Long random conversations through the vendors' own clients, in every dialect: what the agent is given is what was
drawn, and the tree is the one the agent walked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import anthropic
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway
from forgejax.types import Session, Turn
from tests.chat.families import load_families
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

Dialect = Literal["chat", "responses", "messages"]
DIALECTS: tuple[Dialect, ...] = ("chat", "responses", "messages")
FINAL = {"chat": "get_final_completion", "responses": "get_final_response", "messages": "get_final_message"}
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


class Clients:
    """The clients of a session, sync and async; a request goes through one of them, whole or streamed."""

    def __init__(self, session: Session) -> None:
        options: Any = {"api_key": session.api_key, "max_retries": 0, "timeout": 60}
        bare = session.base_url.removesuffix("/v1")  # anthropic's client adds its own
        self._openai = openai.OpenAI(base_url=session.base_url, **options)
        self._openai_async = openai.AsyncOpenAI(base_url=session.base_url, **options)
        self._anthropic = anthropic.Anthropic(base_url=bare, **options)
        self._anthropic_async = anthropic.AsyncAnthropic(base_url=bare, **options)

    async def close(self) -> None:
        self._openai.close()
        self._anthropic.close()
        await self._openai_async.close()
        await self._anthropic_async.close()

    async def ask(self, dialect: Dialect, body: dict[str, Any], *, stream: bool, sync: bool) -> Any:
        """The client's own object for the answer: a chat completion, a response or a message."""
        openai_, anthropic_ = self._openai, self._anthropic
        if sync:
            resources: Any = {"chat": openai_.chat.completions, "responses": openai_.responses}
            return await asyncio.to_thread(
                ask_sync, (resources | {"messages": anthropic_.messages})[dialect], body, stream
            )
        resource: Any = {
            "chat": self._openai_async.chat.completions,
            "responses": self._openai_async.responses,
            "messages": self._anthropic_async.messages,
        }[dialect]
        if not stream:
            return await resource.create(**body)
        async with resource.stream(**body) as events:
            seen = [event async for event in events]
            assert seen
            return await getattr(events, FINAL[dialect])()


def ask_sync(resource: Any, body: dict[str, Any], stream: bool) -> Any:
    if not stream:
        return resource.create(**body)
    with resource.stream(**body) as events:
        assert list(events)
        final = next(name for name in FINAL.values() if hasattr(events, name))
        return getattr(events, final)()


@dataclass
class Agent:
    """One branch of a conversation, in a dialect; ``said`` is what it was given."""

    dialect: Dialect
    clients: Clients
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

    async def ask(self, *, stream: bool, sync: bool, keep: bool) -> tuple[str, str, list[tuple[str, Any]]]:
        """The thought, the text and the calls of the next reply, which goes into the history."""
        body = getattr(self, f"_word_{self.dialect}")()
        answer = await self.clients.ask(self.dialect, body, stream=stream, sync=sync)
        thought, text, calls = getattr(self, f"_read_{self.dialect}")(answer, keep)
        return thought, text, [(name, json.loads(raw)) for name, raw in calls]

    def _word_chat(self) -> dict[str, Any]:
        functions = [{"name": name, "parameters": SCHEMA} for name in NAMES]
        tools = [{"type": "function", "function": function} for function in functions]
        return {"model": "m", "messages": self.history, "tools": tools}

    def _read_chat(self, completion: Any, keep: bool) -> Any:
        message = completion.choices[0].message
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

    def _word_responses(self) -> dict[str, Any]:
        tools = [{"type": "function", "name": name, "parameters": SCHEMA, "strict": False} for name in NAMES]
        return {"model": "m", "input": self.history, "tools": tools, "store": False}

    def _read_responses(self, response: Any, keep: bool) -> Any:
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

    def _word_messages(self) -> dict[str, Any]:
        tools = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
        return {"model": "m", "messages": self.history, "tools": tools, "max_tokens": 999}

    def _read_messages(self, message: Any, keep: bool) -> Any:
        blocks = [block.model_dump(exclude_none=True) for block in message.content]
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
    clients = Clients(session)
    try:
        for _ in range(data.draw(st.integers(1, 2))):
            agent, parent = Agent(data.draw(st.sampled_from(DIALECTS)), clients), None
            agent.say(f"Question {len(parents)}?")
            for _ in range(data.draw(st.integers(1, 4))):
                reply = data.draw(REPLIES)
                sampler.script.append(spell_ids(sampler.chat_format, reply))
                stream, sync, keep = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
                given_ = await agent.ask(stream=stream, sync=sync, keep=keep)
                assert given_ == (reply.thought, reply.text, list(reply.calls))
                parents.append(parent)
                parent = len(parents) - 1
                agent.say(data.draw(st.sampled_from(["out", "é🙂", "<|im_end|>"])))
    finally:
        await clients.close()
    return await gateway.close(session.id), parents


def ancestors(parents: list[int | None], turn: int | None) -> list[int]:
    """The turns that ``turn`` went on from as they were walked, the nearest first."""
    found = []
    while turn is not None and (turn := parents[turn]) is not None:
        found.append(turn)
    return found


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
        # A template that drops thoughts once the user asks anew begins another tree there, and only there: behind an
        # earlier turn of the same walk, up to which no thought was dropped, or at its root.
        assert turn.parent == parent or (family == "qwen3" and turn.parent in [None, *ancestors(parents, parent)])
        if turn.parent is not None:
            before = turns[turn.parent].completion
            known = np.concatenate([before.prompt_ids, before.token_ids])
            assert np.array_equal(turn.completion.prompt_ids[: len(known)], known)
