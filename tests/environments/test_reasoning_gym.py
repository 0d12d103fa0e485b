"""The reasoning-gym task source, on the real library."""

import dataclasses
from collections import Counter

import pytest

from forgejax.environments import DatasetConfig, ReasoningGym, TasksConfig
from forgejax.errors import ConfigError

SMALL: dict[str, int | float | str | bool | list[str]] = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
}


def test_a_task_depends_on_the_configuration_and_its_index_only() -> None:
    first, second = ReasoningGym(TasksConfig()), ReasoningGym(TasksConfig())
    assert first.held_out == second.held_out
    assert first.task(7) == second.task(7)
    other = ReasoningGym(TasksConfig(seed=1))
    assert [first.task(i).question for i in range(8)] != [other.task(i).question for i in range(8)]


def test_no_training_task_has_the_text_of_a_held_out_one() -> None:
    tasks = ReasoningGym(
        TasksConfig(datasets=(DatasetConfig(name="chain_sum", params=SMALL),), eval_tasks=100)
    )  # 200 texts in all
    held_out = {task.question for task in tasks.held_out}
    trained = {tasks.task(index).question for index in range(1000)}
    assert len(held_out) == 100
    assert not held_out & trained
    assert len(trained) > 90


def test_every_stretch_of_tasks_has_each_level_in_its_share() -> None:
    easy, hard = TasksConfig().datasets
    tasks = ReasoningGym(TasksConfig(datasets=(dataclasses.replace(easy, weight=3.0), hard), eval_tasks=40))
    assert abs(Counter(task.level for task in tasks.held_out)["easy"] - 30) <= 2
    assert abs(Counter(tasks.task(index).level for index in range(1000, 1040))["easy"] - 30) <= 2


def test_only_the_right_answer_scores() -> None:
    tasks = ReasoningGym(TasksConfig(eval_tasks=4))
    task = tasks.held_out[1]
    right = task.payload["answer"]
    assert tasks.score_answer(task, right) == 1.0
    assert tasks.score_answer(task, f" {right}\n") == 1.0
    assert [tasks.score_answer(task, answer) for answer in (None, "", "  ", "seven", f"it is {right}", "9" * 5000)] == [
        0
    ] * 6


def test_without_exact_the_librarys_partial_credit_counts() -> None:
    tasks = ReasoningGym(TasksConfig(eval_tasks=1, exact=False))
    task = tasks.held_out[0]
    assert 0.0 < tasks.score_answer(task, f"it is {task.payload['answer']}") < 1.0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("score", [float("inf"), float("nan")])
def test_a_score_of_the_library_that_is_no_number_is_an_error(
    monkeypatch: pytest.MonkeyPatch, score: float, exact: bool
) -> None:
    tasks = ReasoningGym(TasksConfig(eval_tasks=1, exact=exact))
    for dataset in tasks._datasets:
        monkeypatch.setattr(dataset, "score_answer", lambda *_: score, raising=False)
    with pytest.raises(ValueError, match=f"scored 'seven' as {score}"):
        tasks.score_answer(tasks.held_out[0], "seven")


def test_more_held_out_tasks_than_there_are_items_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"eval_tasks is 1000000000 and the datasets have 20000 items in all; lower"):
        ReasoningGym(TasksConfig(eval_tasks=10**9))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (DatasetConfig(name="chain_sums"), "did you mean chain_sum"),
        (DatasetConfig(name="chain_sum", params={"max_term": 3}), "did you mean max_terms"),
        (DatasetConfig(name="chain_sum", params={"min_terms": 5, "max_terms": 3}), "max_terms must be >= min_terms"),
    ],
)
def test_a_dataset_that_cannot_be_built_is_refused_with_what_is_near(dataset: DatasetConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(TasksConfig(datasets=(dataset,)))


def test_holding_out_more_than_a_dataset_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower eval_tasks"):
        ReasoningGym(TasksConfig(datasets=(DatasetConfig(name="chain_sum", params=SMALL),), eval_tasks=201))


@pytest.mark.parametrize("fields", [{"weight": 0.0}, {"params": {"seed": 3}}])
def test_an_impossible_dataset_configuration_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DatasetConfig(name="chain_sum", **fields)  # type: ignore[arg-type]
