"""Dialogues against a real gateway: what the policy saw is what is recorded, whatever was done to the context."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from forgejax.agents import AgentConfig, AgentResult, CoroutineScaffold, EpisodeRunner, EpisodeSpec
from forgejax.agents.scaffolds.coroutine import AgentFunction
from forgejax.agents.white_box import ContextConfig, PolicyAccess
from forgejax.agents.white_box.context import DROPPED
from forgejax.agents.white_box.player import play
from forgejax.chat import ChatFormat
from forgejax.environments import Score, Workspace, WorkTool
from forgejax.types import StopReason, Task, Trajectory, Turn
from tests.agents.fakes import make_task
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

CONTEXT = 260


class Corridor:
    """A game of ``rooms`` moves; every room is described at some length."""

    def __init__(self, rooms: int) -> None:
        self.rooms, self.moves = rooms, list[str]()

    @property
    def observation(self) -> str:
        return f"Room {len(self.moves)}: " + "the answer is behind the next door " * 2

    @property
    def done(self) -> bool:
        return len(self.moves) >= self.rooms

    async def act(self, move: str) -> None:
        self.moves.append(move)


class Corridors:
    """Every episode walks one corridor, and succeeds at its end."""

    held_out: tuple[Task, ...] = ()

    def __init__(self, rooms: int) -> None:
        self.rooms = rooms

    def task(self, index: int) -> Task:
        return make_task(index)

    async def open(self, task: Task) -> Workspace:
        return Workspace(game=Corridor(self.rooms))

    async def close(self, workspace: Workspace) -> None: ...

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        assert workspace.game is not None
        return Score(outcome=float(workspace.game.done))


async def walk(chat_format: ChatFormat, context: ContextConfig, rooms: int = 8) -> tuple[Trajectory, ScriptedSampler]:
    """One episode in a corridor that is longer than the context, by a policy that goes on and on."""
    sampler = ScriptedSampler(chat_format, *(f"on to {n}<|im_end|>" for n in range(rooms)))
    gateway = await started(sampler, context_length=CONTEXT)
    runner = EpisodeRunner(
        sessions=gateway,
        scaffold=CoroutineScaffold(play, context),
        environment=Corridors(rooms),
        agent=AgentConfig(kind="coroutine", function="player:play"),
    )
    trajectory = await runner.run(make_task(), session=TRAINING)
    await gateway.stop()
    return trajectory, sampler


async def talk(
    chat_format: ChatFormat, agent: AgentFunction, *replies: str, context: ContextConfig | None = None
) -> tuple[AgentResult, tuple[Turn, ...]]:
    """What an agent of a few replies gave, and its turns."""
    gateway = await started(ScriptedSampler(chat_format, *replies), context_length=4096)
    opened = gateway.open(TRAINING)
    episode = EpisodeSpec(
        id=opened.id,
        question="q",
        base_url=opened.base_url,
        api_key=opened.api_key,
        model=opened.model,
        context_length=opened.context_length,
        deadline_s=20.0,
    )
    result = await CoroutineScaffold(agent, context).run(episode)
    turns = await gateway.close(opened.id)
    await gateway.stop()
    return result, turns


def read_prompt(chat_format: ChatFormat, turn: Turn) -> str:
    return chat_format.decode(turn.completion.prompt_ids)


async def test_without_context_management_a_task_longer_than_the_context_is_truncated(chat_format: ChatFormat) -> None:
    trajectory, _ = await walk(chat_format, ContextConfig())
    assert (trajectory.stop_reason, trajectory.outcome) == (StopReason.TRUNCATED, 0.0)
    assert [turn.branch for turn in trajectory.turns] == [None] * len(trajectory.turns)


async def test_with_a_sliding_window_it_is_finished_in_branches_whose_contexts_are_those_that_were_seen(
    chat_format: ChatFormat,
) -> None:
    trajectory, sampler = await walk(chat_format, ContextConfig(strategy="sliding_window", keep_exchanges=1))
    assert (trajectory.stop_reason, trajectory.outcome) == (StopReason.COMPLETED, 1.0)
    turns = trajectory.turns
    assert len(turns) == 8 and "sliding_window" in {turn.branch for turn in turns}
    # the ids that are trained on are the engine's own, one by one
    assert [turn.completion for turn in turns] == sampler.returned
    assert all(len(turn.completion.prompt_ids) < CONTEXT for turn in turns)
    for turn in turns:
        text = read_prompt(chat_format, turn)
        assert "0 + 1" in text and "Room 0:" in text  # the head stays
        assert (turn.branch == "sliding_window") == (turn.index > 0 and turn.parent is None)
        if turn.branch is not None:
            room = turn.index
            assert [f"Room {n}:" in text for n in range(1, room + 1)] == [n >= room for n in range(1, room + 1)]


async def test_a_summary_is_a_turn_of_its_own_and_stands_for_what_came_before(chat_format: ChatFormat) -> None:
    async def agent(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
        dialogue = llm.begin()
        for text in ("first", "second", "third"):
            said = await dialogue.ask(text)
        return said.text

    context = ContextConfig(strategy="summarise", at=1e-4, keep_exchanges=1)
    result, turns = await talk(
        chat_format, agent, "a<|im_end|>", "b<|im_end|>", "all of it<|im_end|>", "c<|im_end|>", context=context
    )
    assert result.answer == "c"
    assert [(turn.parent, turn.branch) for turn in turns] == [(None, None), (0, None), (1, None), (None, "summarise")]
    last = read_prompt(chat_format, turns[3])
    assert [word in last for word in ("first", "second", "all of it", "third")] == [True, False, True, True]


def make_tool(name: str, result: str) -> WorkTool:
    async def call(arguments: Mapping[str, Any]) -> str:
        return result

    return WorkTool(name=name, description="looks", parameters={"type": "object", "properties": {}}, call=call)


def word_call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|im_end|>"


async def work_with_tools(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
    return (await llm.begin(tools=[make_tool("look", "a long wall")]).work("go")).text


async def test_old_tool_output_is_dropped_and_the_calls_stay(chat_format: ChatFormat) -> None:
    context = ContextConfig(strategy="drop_tool_output", at=1e-4, keep_exchanges=1)
    replies = [word_call("look"), word_call("look"), "done<|im_end|>"]
    result, turns = await talk(chat_format, work_with_tools, *replies, context=context)
    assert result.answer == "done"
    assert [(turn.parent, turn.branch) for turn in turns] == [(None, None), (0, None), (0, "drop_tool_output")]
    last = read_prompt(chat_format, turns[2])
    assert (last.count(DROPPED), last.count("a long wall"), last.count('"look", "arguments"')) == (1, 1, 2)


async def test_the_policy_may_forget_by_a_call_and_keep_a_note(chat_format: ChatFormat) -> None:
    replies = [word_call("look"), word_call("forget", exchanges=1, note="a wall is there"), "done<|im_end|>"]
    result, turns = await talk(chat_format, work_with_tools, *replies, context=ContextConfig(strategy="forget"))
    assert result.answer == "done"
    assert [(turn.parent, turn.branch) for turn in turns] == [(None, None), (0, None), (None, "forget")]
    last = read_prompt(chat_format, turns[2])
    assert ("a long wall" in last, last.count("a wall is there") >= 1) == (False, True)


async def test_sub_agents_are_branches_of_the_one_session_asked_side_by_side(chat_format: ChatFormat) -> None:
    async def agent(task: EpisodeSpec, llm: PolicyAccess, workspace: Workspace) -> str:
        await llm.begin().ask("split it")
        subs = [llm.begin("You are a helper."), llm.begin("You are a helper."), llm.begin(name="critic")]
        said = await asyncio.gather(*(sub.ask("do your part") for sub in subs))
        return " ".join(sorted(each.text for each in said))

    result, turns = await talk(chat_format, agent, "a<|im_end|>", "b<|im_end|>", "c<|im_end|>", "d<|im_end|>")
    assert result.answer == "b c d"
    assert sorted(str(turn.branch) for turn in turns) == ["None", "critic", "sub_agent", "sub_agent"]
    assert [turn.parent for turn in turns] == [None] * 4


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (word_call("look", x=1), "a long wall"),
        (word_call("listen"), "error: there is no tool listen; there are: look"),
    ],
)
async def test_the_policy_is_told_what_its_call_gave(chat_format: ChatFormat, call: str, told: str) -> None:
    _, turns = await talk(chat_format, work_with_tools, call, "done<|im_end|>")
    assert told in read_prompt(chat_format, turns[1])


def test_every_strategy_that_can_be_configured_is_there() -> None:
    from typing import get_args  # noqa: PLC0415

    from forgejax.agents.white_box import CONTEXT_FUNCTIONS  # noqa: PLC0415
    from forgejax.agents.white_box.context import ContextName  # noqa: PLC0415

    assert set(get_args(ContextName)) == set(CONTEXT_FUNCTIONS)
