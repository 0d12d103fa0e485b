"""Tasks from the reasoning-gym library: a seeded mixture of its datasets, with held-out tasks for evaluation."""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from forgejax.environments.base import Score, Workspace
from forgejax.environments.harbor.tasks import HarborConfig
from forgejax.environments.openenv import OpenEnvConfig
from forgejax.environments.sandbox import SandboxConfig
from forgejax.environments.write_file import WriteFileConfig
from forgejax.errors import ConfigError
from forgejax.types import Task, Trajectory

ITEMS = 10_000  # distinct items drawn from a dataset, unless its params say otherwise (``size``)
DRAWS = 1000  # for one task, before the dataset counts as too small
ANSWER_CHARACTERS = 20_000
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One reasoning-gym dataset of the mixture; ``params`` are passed to it as they are."""

    name: str
    level: str = "default"
    family: str = ""  # of the speed baseline; empty: "name/level"
    weight: float = 1.0
    params: dict[str, int | float | str | bool | list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ConfigError(f'dataset "{self.name}": weight is {self.weight}; expected a finite number above 0')
        if "seed" in self.params:
            raise ConfigError(f'dataset "{self.name}": params sets "seed"; set the seed of the tasks instead')


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Where tasks come from: ``reasoning_gym`` is a mixture of its datasets, ``write_file`` asks for files, ``harbor``
    reads task folders, ``openenv`` plays on a server.

    ``eval_tasks`` are held out. ``exact`` counts only the library's full score as 1 and everything below it as 0.
    What is done in a folder is done in a ``sandbox``. Scoring an episode may take ``score_s``; one without a score by
    then is masked."""

    kind: Literal["reasoning_gym", "write_file", "harbor", "openenv"] = "reasoning_gym"
    datasets: tuple[DatasetConfig, ...] = (
        DatasetConfig(
            name="chain_sum",
            level="easy",
            params={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        ),
        DatasetConfig(
            name="products",
            level="hard",
            params={"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 4},
        ),
    )
    write_file: WriteFileConfig = field(default_factory=WriteFileConfig)
    harbor: HarborConfig = field(default_factory=HarborConfig)
    openenv: OpenEnvConfig = field(default_factory=OpenEnvConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    score_s: float = 30.0
    eval_tasks: int = 64
    seed: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError("tasks datasets is empty; expected at least one dataset")
        if not 0.0 < self.score_s < math.inf:
            raise ConfigError(f"tasks score_s is {self.score_s}; expected a finite number of seconds above 0")
        if self.eval_tasks < 0:
            raise ConfigError(f"tasks eval_tasks is {self.eval_tasks}; expected 0 or more")


class ReasoningGym:
    """An ``Environment`` of questions with answers. ``task(i)`` depends on the configuration and ``i`` only.

    Training tasks are drawn with replacement; ``held_out`` are distinct, and no training task has the question text
    of one of them. Each level gets its share of any run of tasks, to within a few. Raises ConfigError where a dataset
    cannot be built, or is too small to hold out so many tasks.
    """

    def __init__(self, config: TasksConfig) -> None:
        self._config = config
        self._datasets = [
            _build_dataset(dataset, _draw(config.seed, "dataset", n)) for n, dataset in enumerate(config.datasets)
        ]
        items = sum(len(dataset) for dataset in self._datasets)
        if config.eval_tasks > items:
            raise ConfigError(
                f"tasks eval_tasks is {config.eval_tasks} and the datasets have {items} items in all; lower it, or "
                "raise size in the datasets' params"
            )
        self._item = functools.lru_cache(maxsize=4096)(self._build_item)
        self._never_trained: set[str] = set()
        self.held_out: tuple[Task, ...] = tuple(self._hold_out(index) for index in range(config.eval_tasks))

    def task(self, index: int) -> Task:
        """The training task at an absolute index."""
        return self._first_new("train", index)

    async def open(self, task: Task) -> Workspace:
        """Nothing: a question is all there is to work on."""
        return Workspace()

    async def close(self, workspace: Workspace) -> None: ...

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        """The dataset's own score of the answer. Only for its own tasks."""
        return Score(outcome=self.score_answer(task, trajectory.answer))

    def score_answer(self, task: Task, answer: str | None) -> float:
        """In [0, 1]; 0 for a missing or absurdly long answer.

        Raises ValueError where the dataset's own score is no finite number.
        """
        if answer is None or not answer.strip() or len(answer) > ANSWER_CHARACTERS:
            return 0.0
        number, item = int(task.payload["dataset"]), int(task.payload["item"])
        score = float(self._datasets[number].score_answer(answer.strip(), self._item(number, item)))
        if not math.isfinite(score):
            raise ValueError(f'dataset "{self._config.datasets[number].name}" scored {answer[:80]!r} as {score}')
        if self._config.exact:
            return 1.0 if score >= 1.0 else 0.0
        return min(1.0, max(0.0, score))

    def _hold_out(self, index: int) -> Task:
        task = self._first_new("evaluation", index)
        self._never_trained.add(task.question)
        return task

    def _first_new(self, split: str, index: int) -> Task:
        """The first draw for this index whose question is not held out."""
        number = self._dataset_of(index)
        dataset = self._config.datasets[number]
        for attempt in range(DRAWS):
            item = _draw(self._config.seed, split, index, attempt) % len(self._datasets[number])
            entry = self._item(number, item)
            if entry["question"] in self._never_trained:
                continue
            return Task(
                id=f"{split}-{index}",
                family=dataset.family or f"{dataset.name}/{dataset.level}",
                level=dataset.level,
                question=entry["question"],
                payload={"dataset": number, "item": item, "answer": str(entry["answer"])},
            )
        raise ConfigError(
            f'dataset "{dataset.name}" (level {dataset.level}): {DRAWS} draws gave no question beside the '
            f"{len(self._never_trained)} held out; lower eval_tasks ({self._config.eval_tasks}) or widen its params"
        )

    def _dataset_of(self, index: int) -> int:
        """Spreads the indices over the datasets by weight, evenly in every stretch (the golden-ratio sequence)."""
        weights = [dataset.weight for dataset in self._config.datasets]
        point = ((index + 0.5) * GOLDEN) % 1.0 * sum(weights)
        for number, weight in enumerate(weights):
            point -= weight
            if point < 0.0:
                return number
        return len(weights) - 1

    def _build_item(self, number: int, item: int) -> dict[str, Any]:
        entry: dict[str, Any] = self._datasets[number][item]
        return entry


def _draw(*key: object) -> int:
    """A number below 2**32 that depends on the key only, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest())


def _build_dataset(config: DatasetConfig, seed: int) -> Any:
    """The library's dataset object. The import costs seconds, and one of the library's dependencies warns in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym  # noqa: PLC0415
        from reasoning_gym.factory import DATASETS  # noqa: PLC0415

    if config.name not in DATASETS:
        raise ConfigError(f'dataset "{config.name}" is not in reasoning-gym; {_suggest_names(config.name, DATASETS)}')
    known = DATASETS[config.name][1].__dataclass_fields__
    for name in config.params:
        if name not in known:
            raise ConfigError(f'dataset "{config.name}" has no parameter "{name}"; {_suggest_names(name, known)}')
    params = {"size": ITEMS} | config.params if "size" in known else config.params
    try:
        return reasoning_gym.create_dataset(config.name, seed=seed, **params)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f'dataset "{config.name}" refuses {dict(config.params)}: {error!r}; correct params'
        ) from error


def _suggest_names(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of: {', '.join(sorted(known))}"
