"""Whole episodes of real agent programs: their recipes, the gateway, a scripted policy, a folder to work in."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from forgejax.agents import AgentConfig, EpisodeRunner, ProcessScaffold
from forgejax.agents.recipes import INSTALLED, RECIPES, load_recipe
from forgejax.agents.scaffolds.children import find_program
from forgejax.chat import ChatFormat
from forgejax.environments import Score, Workspace
from forgejax.errors import AgentError
from forgejax.plain import from_mapping
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, Task, Trajectory, Turn
from tests.chat.families import save_family
from tests.gateway.fakes import TRAINING, completion, started

Act = Callable[[str], str]
"""What the policy writes behind a prompt, both as text, control tokens included."""

END = "<|im_end|>"


def write_call(name: str, **arguments: object) -> str:
    """A call as the policy's template has it."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def list_user_messages(prompt: str) -> list[str]:
    """What stands between the marks of a user's messages, tools' results among them."""
    return [part.partition(END)[0] for part in prompt.split("<|im_start|>user\n")[1:]]


class ActingSampler:
    """A policy that acts by the text of its prompt; keeps what it drew, in the order of the requests' ends."""

    def __init__(self, chat_format: ChatFormat, tokenizer: Tokenizer, act: Act) -> None:
        self.chat_format = chat_format
        self._tokenizer = tokenizer
        self.returned: list[Completion] = []
        self._act = act

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        said = self._act(self._tokenizer.decode(request.prompt_ids.tolist(), skip_special_tokens=False)) + END
        drawn: list[int] = []
        reason = FinishReason.LENGTH
        for id_ in self.chat_format.codec.encode(said)[: request.max_tokens]:
            drawn.append(id_)
            if (on_tokens is not None and on_tokens([id_])) or id_ in request.stop_ids:
                reason = FinishReason.STOP
                break
        self.returned.append(completion(request, drawn, reason))
        return self.returned[-1]


@dataclass(frozen=True, kw_only=True)
class Played:
    """An episode that has ended, its turns, what lay in its folder, and what the gateway counted."""

    trajectory: Trajectory
    files: Mapping[str, str]
    counts: Mapping[str, float]
    chat_format: ChatFormat

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.trajectory.turns

    @property
    def parents(self) -> list[int | None]:
        return [turn.parent for turn in self.turns]

    @property
    def said(self) -> list[str]:
        return [self.chat_format.decode(turn.completion.token_ids).removesuffix(END) for turn in self.turns]

    @property
    def roots(self) -> list[str]:
        """What was said in the turns that go on from none."""
        return [said for said, parent in zip(self.said, self.parents, strict=True) if parent is None]

    @property
    def untrainable(self) -> list[str | None]:
        return [turn.untrainable for turn in self.turns]


@dataclass(frozen=True)
class Folder:
    """An environment of one task; what lies in its folder at the end is kept."""

    directory: Path
    held_out: tuple[Task, ...] = ()

    def task(self, index: int) -> Task:
        raise NotImplementedError

    async def open(self, task: Task) -> Workspace:
        return Workspace(directory=self.directory)

    async def close(self, workspace: Workspace) -> None: ...

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        return Score(outcome=1.0)


def count_steps(prompt: str) -> int:
    """How many turns' tool results the prompt holds."""
    return sum("<tool_response>" in text for text in list_user_messages(prompt))


@functools.cache
def load_family(family: str) -> tuple[ChatFormat, Tokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        save_family(Path(folder), family)
        return ChatFormat.load(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")


def installed(name: str) -> AgentConfig:
    """The agent of a recipe; the test is skipped where its program is not installed."""
    recipe = load_recipe(name)
    config = from_mapping(AgentConfig, recipe.agent, str(RECIPES / name))
    try:
        find_program(config.command)
    except AgentError:
        pytest.skip(f"the program of {name} is not here: make scaffolds ARGS={name}")
    if (recipe.install.pip or recipe.install.npm) and not (INSTALLED / name).is_dir():
        pytest.skip(f"{name} is not in {INSTALLED}: make scaffolds ARGS={name}")
    return config


async def play(
    config: AgentConfig,
    act: Act,
    question: str,
    directory: Path,
    *,
    context: int = 200_000,
    family: str = "qwen3",
) -> Played:
    """Plays one episode and holds its tree to its definition: every drawn completion is one turn, and a turn that has a
    parent begins with the parent's ids."""
    chat_format, tokenizer = load_family(family)
    sampler = ActingSampler(chat_format, tokenizer, act)
    gateway = await started(sampler, context)  # type: ignore[arg-type]
    scaffold = ProcessScaffold(config)
    await scaffold.start()
    runner = EpisodeRunner(sessions=gateway, scaffold=scaffold, environment=Folder(directory), agent=config)
    try:
        task = Task(id="t", family="f", level="l", question=question)
        trajectory = await runner.run(task, session=TRAINING)
    finally:
        await scaffold.close()
        await gateway.stop()
    _check_tree(trajectory.turns, sampler.returned)
    counts = {name: value for name, value in gateway.metrics.counts().items() if value}
    return Played(trajectory=trajectory, files=_read_files(directory), counts=counts, chat_format=chat_format)


def _check_tree(turns: Sequence[Turn], drawn: Sequence[Completion]) -> None:
    left = {each.request_id: each for each in drawn}
    assert all(left.pop(turn.completion.request_id) is turn.completion for turn in turns) and not left
    for turn in turns:
        if turn.parent is not None:
            before = turns[turn.parent].completion
            ids = np.concatenate([before.prompt_ids, before.token_ids])
            assert np.array_equal(turn.completion.prompt_ids[: len(ids)], ids)


def _read_files(directory: Path) -> dict[str, str]:
    files = [each for each in directory.rglob("*") if each.is_file()]
    return {each.relative_to(directory).as_posix(): each.read_text() for each in files}
