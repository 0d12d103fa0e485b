"""Imitation before RL: its demonstrations are what the gateway would see, and its result is kept for the next run."""

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.environments import ReasoningGym
from forgejax.errors import ConfigError
from forgejax.gateway import Gateway
from forgejax.run.config import TrainConfig, load_config, to_mapping
from forgejax.run.warm_start import (
    Demonstration,
    Demonstrations,
    WarmStartConfig,
    load_cached,
    make_cache_key,
    make_demonstrations,
    save_cached,
)
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SessionSpec, StopReason, Task
from tests.run.tiny_run import QUICKSTART, REPOSITORY, go_on, saved_weights, tiny_config, tiny_place

pytestmark = pytest.mark.usefixtures("compiled_once")
AGENT = REPOSITORY / "examples" / "quickstart" / "agent.py"
TOKENIZER = REPOSITORY / "examples" / "quickstart" / "tokenizer"
DEMONSTRATOR = f"{REPOSITORY / 'examples' / 'quickstart' / 'demonstrations.py'}:CalculatorDemonstrator"
DESCRIBE = (sys.executable, str(AGENT), "--describe")


@pytest.fixture(scope="module")
def quickstart() -> TrainConfig:
    return load_config(QUICKSTART, [f"--tokenizer={TOKENIZER}", "--tasks.eval-tasks=0"])


@pytest.fixture(scope="module")
def tasks(quickstart: TrainConfig) -> ReasoningGym:
    return ReasoningGym(quickstart.tasks)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.load(TOKENIZER)


def demonstrations(quickstart: TrainConfig, tasks: ReasoningGym, chat: ChatFormat, **changes: Any) -> Demonstrations:
    options = quickstart.warm_start.options | {"describe": list(DESCRIBE)} | changes
    config = dataclasses.replace(quickstart.warm_start, demonstrator=DEMONSTRATOR, options=options)
    return make_demonstrations(config, tasks, chat, quickstart.run.seed)


@dataclasses.dataclass(frozen=True)
class Silent:
    """A Demonstrator that shows nothing: its key is all it has."""

    identity: str

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Demonstration:
        return Demonstration(messages=({"role": "user", "content": task.question},))


class Speaker:
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
    quickstart: TrainConfig, tasks: ReasoningGym, chat: ChatFormat, use_tool: bool
) -> None:
    shown = demonstrations(quickstart, tasks, chat, tool_rate=float(use_tool), guessed_levels=[])
    index = 3
    task, samples = tasks.task(1_000_000_000 + index), shown.samples(index)
    sampler = Speaker([sample.token_ids for sample in samples])
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
    assert tasks.score_answer(task, printed.decode()) == 1.0
    assert sampler.prompts == [sample.context_ids.tolist() for sample in samples]
    assert len(turns) == (2 if use_tool else 1)
    assert [(turn.parent, turn.tool_calls, turn.malformed_tool_calls) for turn in turns] == (
        [(None, 1, 0), (0, 0, 0)] if use_tool else [(None, 0, 0)]
    )
    assert StopReason.COMPLETED == "completed"


def test_a_second_turn_goes_on_from_the_ids_of_the_first(
    quickstart: TrainConfig, tasks: ReasoningGym, chat: ChatFormat
) -> None:
    shown = demonstrations(quickstart, tasks, chat, tool_rate=1.0)
    for index in range(20):
        first, second = shown.samples(index)
        spoken = np.concatenate([first.context_ids, first.token_ids])
        assert second.context_ids[: len(spoken)].tolist() == spoken.tolist()
        assert {int(first.token_ids[-1]), int(second.token_ids[-1])} == {chat.end_of_turn_id}
        assert second.fed_tokens <= quickstart.engine.max_context


def test_guesses_are_wrong_only_at_guessed_levels_and_never_where_the_tool_is_used(
    quickstart: TrainConfig, tasks: ReasoningGym, chat: ChatFormat
) -> None:
    shown = demonstrations(quickstart, tasks, chat, tool_rate=0.5, guessed_levels=["hard"])
    right: dict[tuple[str, int], list[bool]] = {}
    for index in range(60):
        task, samples = tasks.task(1_000_000_000 + index), shown.samples(index)
        answer = chat.decode(samples[-1].token_ids.tolist()).strip()
        right.setdefault((task.level, len(samples)), []).append(answer == task.payload["answer"])

    assert set(right) == {("easy", 1), ("easy", 2), ("hard", 1), ("hard", 2)}
    assert all(right["easy", 1]) and all(right["easy", 2]) and all(right["hard", 2])
    assert sum(right["hard", 1]) <= 2, "the first number of the question is hardly ever its answer"


def test_the_key_depends_on_settings_tokenizer_and_the_agents_words_and_on_nothing_else(
    quickstart: TrainConfig, tasks: ReasoningGym, chat: ChatFormat, tmp_path: Path
) -> None:
    shown, settings = demonstrations(quickstart, tasks, chat), to_mapping(quickstart.policy)
    other = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    key = make_cache_key(settings, shown, str(TOKENIZER))

    assert key == make_cache_key(dict(reversed(settings.items())), demonstrations(quickstart, tasks, chat), str(other))
    rewritten = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(rewritten, indent=1) + " ")
    reworded = dataclasses.replace(shown, demonstrator=Silent("Another prompt."))
    untooled = dataclasses.replace(shown, demonstrator=Silent("No tools."))
    others = [
        make_cache_key(settings | {"d_model": 16}, shown, str(TOKENIZER)),
        make_cache_key(settings, shown, str(other)),
        make_cache_key(settings, reworded, str(TOKENIZER)),
        make_cache_key(settings, untooled, str(TOKENIZER)),
    ]
    assert len({key, *others}) == 5


def test_a_second_run_takes_the_warm_weights_from_the_cache_and_another_configuration_does_not(tmp_path: Path) -> None:
    def weights(tool_rate: float) -> Any:
        config = tiny_config(
            tmp_path / "runs",
            *("--run.steps=0", "--tasks.eval-tasks=0", "--warm-start.batch-size=2"),
            *("--warm-start.demonstrations=4", f"--warm-start.cache={tmp_path / 'cache'}"),
            "--warm-start.optimizer.total-steps=30",
        )
        config = dataclasses.replace(
            config,
            warm_start=dataclasses.replace(
                config.warm_start,
                steps=2,
                demonstrator=DEMONSTRATOR,
                options={"tool_rate": tool_rate, "guessed_levels": ["hard"], "describe": list(DESCRIBE)},
            ),
        )
        ended = go_on(config, tiny_place(config))
        notes.extend(ended.notes)
        return np.concatenate([leaf.ravel() for leaf in saved_weights(config, ended.path)])

    notes: list[str] = []
    cold = weights(0.2)
    assert not any("taken from" in note for note in notes)
    (kept,) = (tmp_path / "cache").iterdir()
    warm = weights(0.2)
    assert sum(f"warm start taken from {kept}" in note for note in notes) == 1
    np.testing.assert_array_equal(cold, warm)
    notes.clear()
    other = weights(1.0)
    assert not any("taken from" in note for note in notes)
    assert not np.array_equal(other, cold)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_weights_are_kept_and_come_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    cached, notes = tmp_path / "cache" / "key", list[str]()
    assert load_cached(cached, tree(0.0), notes.append) is None
    save_cached(cached, tree(3.0), notes.append)
    save_cached(cached, tree(4.0), notes.append)  # by a run that began at the same time, and was slower
    assert notes == []
    assert kept_values(load_cached(cached, tree(0.0), notes.append)) == {3.0}
    assert notes == [f"warm start taken from {cached}"]
    assert [path.name for path in cached.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["empty", "no metadata", "cut data", "another policy"])
def test_a_cache_that_cannot_be_read_is_told_and_made_anew(tmp_path: Path, damage: str) -> None:
    cached, notes = tmp_path / "key", list[str]()
    save_cached(cached, {"other": tree(1.0)["w0"]} if damage == "another policy" else tree(1.0), notes.append)
    if damage == "empty":
        shutil.rmtree(cached)
        cached.mkdir()
    elif damage == "no metadata":
        (cached / "_METADATA").unlink()
    elif damage == "cut data":
        for file in (file for file in cached.rglob("d/*") if file.is_file()):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    assert load_cached(cached, tree(0.0), notes.append) is None
    assert len(notes) == 1 and notes[0].startswith(f"the warm start kept in {cached} is damaged and is made anew: ")
    assert list(tmp_path.iterdir()) == []
    save_cached(cached, tree(2.0), notes.append)
    assert kept_values(load_cached(cached, tree(0.0), notes.append)) == {2.0}


def test_a_cache_that_cannot_be_written_is_told_and_no_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notes: list[str] = []
    save_cached(tmp_path / "file" / "key", tree(1.0), notes.append)
    assert len(notes) == 1 and "could not be kept in" in notes[0]


def test_what_a_killed_run_left_in_the_cache_goes_with_time(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in (".key.dead", ".key.alive", ".yek.dead"))
    for left in (dead, alive, other):
        left.mkdir()
    os.utime(dead, (1, 1))
    os.utime(other, (1, 1))
    save_cached(tmp_path / "key", tree(1.0), lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".key.alive", ".yek.dead"}


RACER = """
import sys, time
from pathlib import Path
from forgejax.run.warm_start import load_cached, save_cached
from tests.run.test_warm_start import kept_values, tree
value = float(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    path, moment = line.rsplit(" ", 1)
    time.sleep(max(0.0, float(moment) - time.time()))
    notes = []
    save_cached(Path(path), tree(value), notes.append)
    print(list(notes), kept_values(load_cached(Path(path), tree(0.0), notes.append)), flush=True)
"""


def test_of_runs_that_keep_the_same_at_once_one_wins_and_all_go_on(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
            text=True,
        )
        for value in (1, 2)
    ]
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(answer, racers)) == ["ready", "ready"]
            for number in range(6):
                said = set(threads.map(answer, racers, [f"{tmp_path / str(number)} {time.time() + 0.1}"] * 2))
                assert said in ({"[] {1.0}"}, {"[] {2.0}"}), "both have the same whole one, and neither complains"
        assert len(list(tmp_path.iterdir())) == 6
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def answer(racer: subprocess.Popen[str], line: str = "") -> str:
    """What a racer says to a line, within the deadline of the test."""
    assert racer.stdin is not None and racer.stdout is not None
    if line:
        racer.stdin.write(f"{line}\n")
        racer.stdin.flush()
    return racer.stdout.readline().strip()


def tree(value: float) -> Any:
    """Weights that are all one value."""
    return {f"w{number}": jnp.full((64, 64), value) for number in range(8)}


def kept_values(params: Any) -> set[float]:
    return {float(each) for leaf in params.values() for each in np.unique(np.asarray(leaf))}


def test_the_quickstart_imitates_a_demonstrator_that_is_there_and_speaks_as_the_agent_it_trains() -> None:
    config = load_config(QUICKSTART)
    describe = config.warm_start.options["describe"]
    file, _, name = config.warm_start.demonstrator.partition(":")

    assert isinstance(describe, list)
    assert describe[1] == config.agent.command[1]
    assert (REPOSITORY / file).is_file()
    assert (file, name) == ("examples/quickstart/demonstrations.py", "CalculatorDemonstrator")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"demonstrator": "examples/nowhere.py:x"},
            r'demonstrator "examples/nowhere.py:x" cannot be imported: there is',
        ),
        ({"demonstrator": f"{DEMONSTRATOR}s"}, "cannot be imported.* has no attribute"),
        ({"options": {"tool_rate": 1.0}}, "does not take warm_start.options .*'describe'"),
        ({"options": {"tool_rate": 1.5, "describe": list(DESCRIBE)}}, r"tool_rate is 1\.5; expected a share"),
    ],
)
def test_a_demonstrator_that_cannot_be_had_is_told(
    tasks: ReasoningGym, chat: ChatFormat, changes: dict[str, Any], sentence: str
) -> None:
    config = WarmStartConfig(**({"demonstrator": DEMONSTRATOR} | changes))
    with pytest.raises(ConfigError, match=sentence):
        make_demonstrations(config, tasks, chat, seed=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 5}, "demonstrator is empty; name what makes"),
        ({"batch_size": 0}, "expected 0 or more steps of 1 up to all demonstrations"),
        ({"batch_size": 9000}, "expected 0 or more steps of 1 up to all demonstrations"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        WarmStartConfig(**changes)
