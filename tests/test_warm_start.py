"""Imitation before RL: its demonstrations are what the gateway would see, and its result is kept for the next run."""

import asyncio
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import QUICKSTART, REPOSITORY, compiled_once, tiny_config, tiny_outcome, tiny_place

from forgejax.agents import ReasoningGymTasks
from forgejax.agents.demonstrations import describe_agent
from forgejax.config import TrainConfig, load_config, to_mapping
from forgejax.errors import ConfigError
from forgejax.gateway import ChatFormat, Gateway
from forgejax.report.progress import NoProgress
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SessionSpec, StopReason, TaskSource
from forgejax.warm_start import Demonstrations, WarmStartConfig, cache_key, make_demonstrations

pytestmark = pytest.mark.usefixtures(compiled_once.__name__)
AGENT = REPOSITORY / "examples" / "agents" / "calculator_agent.py"
TOKENIZER = REPOSITORY / "configs" / "quickstart" / "tokenizer"
DESCRIBE = (sys.executable, str(AGENT), "--describe")


@pytest.fixture(scope="module")
def quickstart() -> TrainConfig:
    return load_config(QUICKSTART, [f"--tokenizer={TOKENIZER}", "--tasks.eval-tasks=0"])


@pytest.fixture(scope="module")
def tasks(quickstart: TrainConfig) -> TaskSource:
    return ReasoningGymTasks(quickstart.tasks)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.load(TOKENIZER)


def demonstrations(quickstart: TrainConfig, tasks: TaskSource, chat: ChatFormat, **changes: Any) -> Demonstrations:
    config = dataclasses.replace(quickstart.warm_start, describe=DESCRIBE, **changes)
    return make_demonstrations(config, tasks, chat, quickstart.run.seed)


class Demonstrator:
    """A Sampler that says what a demonstration says, and remembers what it was asked."""

    def __init__(self, turns: Sequence[np.ndarray]) -> None:
        self._turns = list(turns)
        self.prompts: list[list[int]] = []

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.prompts.append(request.prompt_ids.tolist())
        ids = self._turns[len(self.prompts) - 1]
        if on_tokens is not None:
            on_tokens(ids.tolist())
        return Completion(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            token_ids=ids,
            logprobs=np.full(len(ids), -1.0, np.float32),
            versions=np.zeros(len(ids), np.int32),
            oldest_versions=np.zeros(len(ids), np.int32),
            finish_reason=FinishReason.STOP,
            law=request.law,
        )


@pytest.mark.parametrize("use_tool", [True, False])
async def test_the_real_agent_prompts_and_is_answered_exactly_as_demonstrated(
    quickstart: TrainConfig, tasks: TaskSource, chat: ChatFormat, use_tool: bool
) -> None:
    shown = demonstrations(quickstart, tasks, chat, tool_rate=float(use_tool), guessed_levels=())
    index = 3
    task, samples = tasks.task(1_000_000_000 + index), shown.samples(index)
    sampler = Demonstrator([sample.token_ids for sample in samples])
    gateway = Gateway(sampler, chat, quickstart.engine.max_context, quickstart.gateway)
    await gateway.start(port=0)
    try:
        session = gateway.open(SessionSpec())
        environment = os.environ | {"OPENAI_BASE_URL": session.base_url, "OPENAI_API_KEY": session.api_key}
        agent = await asyncio.create_subprocess_exec(
            sys.executable,
            str(AGENT),
            task.question,
            env=environment | {"CALCULATOR_LATENCY_S": "0", "NO_PROXY": "127.0.0.1"},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            printed, _ = await agent.communicate()
        turns = await gateway.close(session.id)
    finally:
        await gateway.stop()

    assert printed.decode().strip() == task.payload["answer"]
    assert tasks.score(task, printed.decode()) == 1.0
    assert sampler.prompts == [sample.context_ids.tolist() for sample in samples]
    assert len(turns) == (2 if use_tool else 1)
    assert [(turn.parent, turn.tool_calls, turn.malformed_tool_calls) for turn in turns] == (
        [(None, 1, 0), (0, 0, 0)] if use_tool else [(None, 0, 0)]
    )
    assert StopReason.COMPLETED == "completed"


def test_a_second_turn_goes_on_from_the_ids_of_the_first(
    quickstart: TrainConfig, tasks: TaskSource, chat: ChatFormat
) -> None:
    shown = demonstrations(quickstart, tasks, chat, tool_rate=1.0)
    for index in range(20):
        first, second = shown.samples(index)
        spoken = np.concatenate([first.context_ids, first.token_ids])
        assert second.context_ids[: len(spoken)].tolist() == spoken.tolist()
        assert {int(first.token_ids[-1]), int(second.token_ids[-1])} == {chat.end_of_turn_id}
        assert second.fed_tokens <= quickstart.engine.max_context


def test_guesses_are_wrong_only_at_guessed_levels_and_never_where_the_tool_is_used(
    quickstart: TrainConfig, tasks: TaskSource, chat: ChatFormat
) -> None:
    shown = demonstrations(quickstart, tasks, chat, tool_rate=0.5, guessed_levels=("hard",))
    right: dict[tuple[str, int], list[bool]] = {}
    for index in range(60):
        task, samples = tasks.task(1_000_000_000 + index), shown.samples(index)
        answer = chat.decode(samples[-1].token_ids.tolist()).strip()
        right.setdefault((task.level, len(samples)), []).append(answer == task.payload["answer"])

    assert set(right) == {("easy", 1), ("easy", 2), ("hard", 1), ("hard", 2)}
    assert all(right["easy", 1]) and all(right["easy", 2]) and all(right["hard", 2])
    assert sum(right["hard", 1]) <= 2, "the first number of the question is hardly ever its answer"


def test_the_key_depends_on_settings_tokenizer_and_the_agents_words_and_on_nothing_else(
    quickstart: TrainConfig, tasks: TaskSource, chat: ChatFormat, tmp_path: Path
) -> None:
    shown, settings = demonstrations(quickstart, tasks, chat), to_mapping(quickstart.policy)
    other = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    key = cache_key(settings, shown, str(TOKENIZER))

    assert key == cache_key(dict(reversed(settings.items())), demonstrations(quickstart, tasks, chat), str(other))
    rewritten = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(rewritten, indent=1) + " ")
    reworded = dataclasses.replace(shown, agent=dataclasses.replace(shown.agent, system="Another prompt."))
    untooled = dataclasses.replace(shown, agent=dataclasses.replace(shown.agent, tools=()))
    others = [
        cache_key(settings | {"d_model": 16}, shown, str(TOKENIZER)),
        cache_key(settings, shown, str(other)),
        cache_key(settings, reworded, str(TOKENIZER)),
        cache_key(settings, untooled, str(TOKENIZER)),
    ]
    assert len({key, *others}) == 5


def test_a_second_run_takes_the_warm_weights_from_the_cache_and_another_configuration_does_not(tmp_path: Path) -> None:
    class Notes(NoProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    def weights(*overrides: str) -> Any:
        config = tiny_config(
            tmp_path / "runs",
            *("--run.steps=0", "--tasks.eval-tasks=0", "--warm-start.batch-size=2"),
            *("--warm-start.demonstrations=4", f"--warm-start.cache={tmp_path / 'cache'}"),
            *("--warm-start.optimizer.total-steps=30", *overrides),
        )
        config = dataclasses.replace(
            config, warm_start=dataclasses.replace(config.warm_start, steps=2, describe=DESCRIBE)
        )
        outcome = tiny_outcome(config, tiny_place(config), Notes())
        leaves = jax.device_get(jax.tree.leaves(outcome.trainer.learner.state.params))
        return np.concatenate([leaf.ravel() for leaf in leaves])

    notes: list[str] = []
    cold = weights()
    assert not any("taken from" in note for note in notes)
    (kept,) = (tmp_path / "cache").iterdir()
    warm = weights()
    assert sum(f"warm start taken from {kept}" in note for note in notes) == 1
    np.testing.assert_array_equal(cold, warm)
    notes.clear()
    other = weights("--warm-start.tool-rate=1")
    assert not any("taken from" in note for note in notes)
    assert not np.array_equal(other, cold)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_quickstart_asks_the_agent_it_trains_with() -> None:
    config = load_config(QUICKSTART)
    described = describe_agent((sys.executable, str(REPOSITORY / config.warm_start.describe[1]), "--describe"))

    assert config.warm_start.describe[1] == config.agent.command[1]
    assert [tool["function"]["name"] for tool in described.tools] == ["calculator"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 5}, r"describe is empty; give the command"),
        ({"batch_size": 0}, "expected 0 or more steps of 1 up to all demonstrations"),
        ({"batch_size": 9000}, "expected 0 or more steps of 1 up to all demonstrations"),
        ({"tool_rate": 1.5}, r"tool_rate is 1\.5; expected a share"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        WarmStartConfig(**changes)
