"""An environment elsewhere, over a server that speaks as openenv-core does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forgejax.environments import Workspace
from forgejax.environments.openenv import OpenEnv, OpenEnvConfig
from forgejax.environments.openenv.environment import OpenEnvGame, word_result
from forgejax.errors import ConfigError, EnvironmentLostError, UnscoredError
from tests.agents.fakes import make_trajectory
from tests.environments.openenv.fake_server import TOOL, GuessServer, serve


def make(url: str, **settings: Any) -> OpenEnv:
    return OpenEnv(OpenEnvConfig(url=url, **settings), eval_tasks=12, seed=0)


def game_of(workspace: Workspace) -> OpenEnvGame:
    assert isinstance(workspace.game, OpenEnvGame)
    return workspace.game


async def test_moves_are_steps_and_every_reward_is_granted_at_its_time() -> None:
    async with serve(server := GuessServer()) as url:
        environment = make(url, observation="message")
        task = environment.held_out[7]
        workspace = await environment.open(task)
        game = game_of(workspace)
        seen = [game.observation]
        for move in ("3", "not a number", "6", "7"):
            assert not game.done
            await game.act(move)
            seen.append(game.observation)
        assert (game.done, (await game.connection.read_state())["step_count"]) == (True, 3)
        score = environment.score(task, workspace, make_trajectory())
        await environment.close(workspace)
        assert seen == ["Guess a number from 0 to 9.", "off by 4", "error: Invalid message", "off by 1", "right"]
    assert score.outcome == 1.0
    assert [reward.value for reward in score.rewards] == [0.06, 0.09]
    assert [reward.at for reward in score.rewards] == [at for _, at in game.rewards[:2]]
    assert server.open == 0


async def test_the_servers_tools_are_those_of_the_conversation() -> None:
    async with serve(GuessServer()) as url:
        environment = make(url, form="tools", instruction="Find the number.")
        task = environment.held_out[2]
        workspace = await environment.open(task)
        (tool,) = workspace.tools
        told = [await tool.call({"number": number}) for number in (4, "x", 2, 2)]
        score = environment.score(task, workspace, make_trajectory())
        await environment.close(workspace)
    assert tool.describe() == {"name": "guess", "description": TOOL["description"], "parameters": TOOL["input_schema"]}
    assert told == ["off by 2", "error: Invalid message", "right", "error: the episode is over"]
    assert (task.question, score.outcome, [each.value for each in score.rewards]) == ("Find the number.", 1.0, [0.08])


async def test_a_full_server_is_asked_again_until_it_has_room_or_the_time_is_over() -> None:
    async with serve(server := GuessServer(room=1)) as url:
        environment, hasty = make(url, open_s=10.0), make(url, open_s=0.15)
        first = await environment.open(environment.task(0))
        with pytest.raises(EnvironmentLostError, match=r"had no room for a session within 0\.15 s: Server at capacity"):
            await hasty.open(hasty.task(1))
        waiting = asyncio.create_task(environment.open(environment.task(1)))
        while server.refused < 3:  # noqa: ASYNC110 (what is watched is the server's own count)
            await asyncio.sleep(0.005)
        await environment.close(first)
        await environment.close(await waiting)


async def test_a_session_that_breaks_off_is_lost_and_one_without_rewards_is_unscored() -> None:
    async with serve(server := GuessServer()) as url:
        environment = make(url)
        task = environment.task(0)
        workspace = await environment.open(task)
        assert environment.score(task, workspace, make_trajectory()).outcome == 0.0
        server.rewarding = False
        await game_of(workspace).act("1")
        with pytest.raises(UnscoredError, match="gave no reward in 1 steps"):
            environment.score(task, workspace, make_trajectory())
        server.breaking = True
        with pytest.raises(EnvironmentLostError, match="the connection ended at a step"):
            await game_of(workspace).act("1")
        await environment.close(workspace)
    with pytest.raises(EnvironmentLostError, match=r"is the server up, and tasks\.openenv\.url its address"):
        await environment.open(task)


def test_tasks_depend_on_the_seed_and_none_is_held_out() -> None:
    environment = make("http://127.0.0.1:1")
    held = {task.payload["seed"] for task in environment.held_out}
    trained = [environment.task(index).payload["seed"] for index in range(200)]
    assert held == set(range(12)) and not held & set(trained) and len(set(trained)) == 200
    assert trained == [make("http://127.0.0.1:1").task(index).payload["seed"] for index in range(200)]


def test_results_of_tools_are_told_in_words() -> None:
    assert (
        word_result({"result": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}) == "a\nb"
    )
    assert word_result({"result": {"x": 1}}) == '{"x": 1}'
    assert word_result({"result": None, "error": {"error_type": "timeout", "message": "late"}}) == "error: late"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"url": "localhost:8000"}, 'tasks openenv.url is "localhost:8000"; expected the address'),
        ({"reset": {"seed": 3}}, 'openenv.reset sets "seed"'),
        ({"open_s": 60.0}, r"openenv.open_s is 60.0; expected a finite number of seconds above 0, 50 at most"),
        ({"form": "tools"}, 'openenv.instruction is empty with form "tools"'),
    ],
)
def test_what_cannot_be_played_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(**({"url": "http://127.0.0.1:1"} | settings))
