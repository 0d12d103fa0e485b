"""The loop: in which order a step is made, and that each thing that can go wrong shows and loses nothing."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from forgejax.errors import AgentError, ForgejaxError, StorageFullError, TrainingError
from forgejax.learner import Learner, PackedStep
from forgejax.pool.journal import Journal
from forgejax.report.final.summary import read_summary
from forgejax.report.sinks.base import Row
from forgejax.report.sinks.jsonl import JsonLines, read_metrics
from forgejax.rollout import EngineAccount
from forgejax.run import rundir
from forgejax.run.account import RunSums
from forgejax.run.build import play_run
from forgejax.run.config import RunConfig
from forgejax.run.loop import Trainer
from forgejax.run.steps import StepData
from tests.run.tiny_run import GROUP, REPOSITORY, Ended, Notes, go_on, play, saved_weights, tiny_config, tiny_place

pytestmark = pytest.mark.usefixtures("compiled_once")


class ListedSteps:
    """A ``StepSource`` of so many steps, of nothing."""

    def __init__(self, count: int) -> None:
        self._left, self._given = count, 0

    def next(self) -> StepData | None:
        if self._given == self._left:
            return None
        self._given += 1
        training: Any = SimpleNamespace(packed=None)
        return StepData(number=self._given - 1, training=training, figures={}, packing_began=0.0, packing_ended=0.0)

    def get_state(self) -> dict[str, Any]:
        return {"given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._given = state["given"]


class Told:
    """Stands for a part of the run: writes down which of its methods is called."""

    def __init__(self, name: str, calls: list[str], **values: Any) -> None:
        self._name, self._calls = name, calls
        self.__dict__.update(values)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Callable[[], None]:
            self._calls.append(f"{self._name}.{method}")
            return lambda: self._calls.append(f"{self._name}.{method} ends")

        return call


def trainer_of(count: int, calls: list[str], **run_config: int) -> Trainer:
    """A trainer with a source of ``count`` steps, of parts that do nothing."""
    parts: dict[str, Any] = {
        name: Told(name, calls) for name in ("engines", "service", "pool", "environment", "chat", "audit", "rows")
    }
    parts["progress"] = Notes()
    parts["learner"] = Told("learner", calls, state=SimpleNamespace(params=None))
    parts["account"] = Told("account", calls, sums=RunSums(trained_tokens=7))
    parts["checkpoints"] = Told("checkpoints", calls, latest=None, oldest=None)
    return Trainer(config=RunConfig(**cast(Any, run_config)), steps=ListedSteps(count), **parts)


def test_weights_are_published_before_their_groups_retire_and_a_step_is_logged_once_the_next_is_under_way() -> None:
    calls: list[str] = []
    trainer = trainer_of(9, calls, steps=2, checkpoint_every=0, probe_every=0)
    trainer.train()
    take = ["service.check", "checkpoints.check", "rows.took"]
    step = ["learner.update", "engines.publish", "pool.publish", "pool.retire"]
    log = ["rows.open ends", "audit.compare_ids"]

    assert calls == [
        "rows.mark",
        *(*take, *step, "rows.open"),
        *(*take, *step, *log, "rows.open"),
        *(*log, "account.count_time", "checkpoints.save"),
    ]
    assert trainer.steps.get_state() == {"given": 2}


def test_a_step_is_logged_before_the_checkpoint_that_holds_it() -> None:
    calls: list[str] = []
    trainer_of(9, calls, steps=1, checkpoint_every=1, probe_every=0).train()

    assert calls.index("audit.compare_ids") < calls.index("checkpoints.save")


def test_a_source_that_ends_is_an_error_unless_the_run_was_asked_to_stop() -> None:
    trainer = trainer_of(1, [], steps=3)
    with pytest.raises(TrainingError, match="the data pool was closed while the run goes on"):
        trainer.train()
    assert trainer.step == 1
    trainer.stop()
    trainer.train()
    assert trainer.step == 1


@pytest.mark.parametrize("sound", [True, False])
def test_a_run_that_its_agents_end_saves_its_last_step_first_if_that_is_sound(sound: bool) -> None:
    calls: list[str] = []
    trainer = trainer_of(9, calls, steps=5, checkpoint_every=0, probe_every=0, max_skipped=2)
    trainer.progress, check = Notes(), trainer.service.check

    def fail_at_the_third(*_: object) -> None:
        check()
        if trainer.step == 2:
            trainer.account.sums.skipped_in_a_row = 0 if sound else 2
            raise AgentError("the workers are gone")

    trainer.service.__dict__["check"] = fail_at_the_third
    with pytest.raises(AgentError, match="the workers are gone"):
        trainer.train()

    assert calls.count("audit.compare_ids") == 2, "both steps have their rows"
    saved = ["account.count_time", "checkpoints.save", "checkpoints.wait"]
    assert [call for call in calls if call in saved] == (saved if sound else [])
    said = "is saved; go on from it with --resume once" if sound else "could not be saved: 2 steps in a row had a loss"
    assert len(trainer.progress.lines) == 1 and trainer.progress.lines[0].startswith(f"step 2 {said}")


def test_what_cannot_be_saved_at_the_end_is_told_and_hides_nothing() -> None:
    trainer = trainer_of(0, [], steps=5)
    trainer.progress = Notes()

    def fail(*_: object) -> None:
        raise StorageFullError("the disk is full")

    trainer.checkpoints.__dict__["save"] = fail
    with pytest.raises(TrainingError, match="the data pool was closed"):
        trainer.train()
    assert trainer.progress.lines == ["step 0 could not be saved: the disk is full"]


def test_a_run_that_was_stopped_is_not_evaluated_and_its_account_is_closed_when_nothing_moves(tmp_path: Path) -> None:
    calls: list[str] = []
    trainer = trainer_of(9, calls, steps=3)
    trainer.progress = Notes()
    trainer.learner.__dict__["batch_shapes"] = {1, 2}
    trainer.rows.__dict__ |= {"compiles": SimpleNamespace(count=5), "episodes": SimpleNamespace(failures=())}
    trainer.environment.__dict__["held_out"] = ()
    trainer.engines.__dict__["account"] = lambda: EngineAccount(prompt_tokens=8, cached_tokens=2)
    trainer.pool.__dict__["snapshot"] = lambda: SimpleNamespace(staleness_max=1, disorder_max=4)
    trainer.stop()
    outcome = trainer.run(tmp_path / "before.json")

    assert calls[calls.index("service.start_groups") :] == [
        *("service.start_groups", "rows.mark", "service.check", "checkpoints.check"),
        *("account.count_time", "checkpoints.save"),
        *("service.stop_groups", "pool.close", "pool.rewind", "checkpoints.wait"),
        *("account.count_time", "account.close", "learner.digest"),
    ]
    assert (outcome.before, outcome.after, outcome.finished, outcome.steps) == (None, None, False, 0)
    assert (outcome.staleness_max, outcome.disorder_max, outcome.cache_hit_rate) == (1, 4, 0.25)
    assert (outcome.compiles, outcome.batch_shapes, outcome.sums) == (5, 2, RunSums(trained_tokens=7))
    assert outcome.sums is not trainer.account.sums


def consumption(path: Path) -> dict[int, list[int]]:
    """The groups of each trained batch, in the lineage that survived."""
    with contextlib.closing(Journal.open(f"sqlite:///{path}/journal.sqlite")) as journal:
        taken: dict[int, list[int]] = {}
        for record in journal.consumption():
            if record.kind == "taken":
                taken.setdefault(record.step, []).append(record.index)
    return taken


def test_while_it_waits_it_can_say_how_far_the_episodes_are(ended: Ended) -> None:
    first, *steps, last = ended.waits
    episodes = ended.config.tasks.eval_tasks * ended.config.run.eval_samples

    assert first == last == f"0 of {episodes} episodes played, no episode is running"
    assert [wait.split(":")[0] for wait in steps] == ["step 1", "step 2", "step 3"]
    assert all(f" of {ended.config.pool.window.groups_per_step} groups done" in wait for wait in steps)


def test_each_step_trains_its_groups_once(ended: Ended) -> None:
    taken, summary = consumption(ended.path), read_summary(ended.path)
    trained = [index for step in range(3) for index in taken[step]]

    assert len(trained) == len(set(trained)) == summary.groups_trained
    assert summary.steps == 3


def test_a_learning_rate_of_zero_leaves_every_weight_as_it_was(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--run.steps=3", "--step.optimizer.learning-rate=0", "--tasks.eval-tasks=0")
    place, seen = tiny_place(config), []

    def remember(trainer: Trainer) -> None:
        seen.extend(jax.device_get(jax.tree.leaves(trainer.learner.params())))

    with contextlib.closing(place):
        outcome = play_run(config, place, Notes(), remember)
    after = saved_weights(config, place.path)

    assert outcome.steps == 3 and outcome.account.tokens_trained > 0
    assert len(seen) == len(after) > 5
    assert all(np.array_equal(before, now) for before, now in zip(seen, after, strict=True))


def poison(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    """Makes the advantages of the steps that start on these versions NaN."""
    update = Learner.update

    def poisoned(learner: Learner, step: PackedStep, version: int) -> Any:
        if version in versions:
            nan = np.float32(np.nan)
            batches = [
                dataclasses.replace(each, advantage_BM=np.asarray(each.advantage_BM) * nan) for each in step.batches
            ]
            step = dataclasses.replace(step, batches=tuple(batches))
        return update(learner, step, version)

    monkeypatch.setattr(Learner, "update", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_its_tokens_are_counted_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1)
    ended = play(tmp_path, "--run.steps=3", "--tasks.eval-tasks=0")
    rows = [row for row in read_metrics(ended.path) if "learner/loss" in row]

    assert [row["learner/skipped"] for row in rows] == [0, 1, 0]
    assert ended.summary.skipped_steps == 1
    assert ended.summary.tokens_not_trained["skipped_step"] == rows[1]["learner/trained_terms"] > 0
    assert ended.summary.tokens_trained == rows[0]["learner/trained_terms"] + rows[2]["learner/trained_terms"]
    assert ended.summary.account_open_tokens == 0
    assert "step 2 was not finite and has been skipped" in ended.notes


def test_a_skipped_step_that_is_trained_after_a_resume_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--run.steps=4", "--run.max-skipped=2", "--tasks.eval-tasks=0")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_every=0))
    place = tiny_place(config)
    with monkeypatch.context() as patched:
        poison(patched, 0, 1, 2)
        with pytest.raises(TrainingError, match=r"2 steps in a row had a loss or gradient that is not finite; lower"):
            go_on(config, place)
    ended = go_on(config, rundir.reopen(tmp_path, ""))

    assert ended.summary.steps == 4
    assert (ended.summary.skipped_steps, ended.summary.account_open_tokens, ended.summary.groups_open) == (0, 0, 0)
    assert "skipped_step" not in ended.summary.tokens_not_trained


def test_a_full_disk_ends_the_run_and_what_was_accepted_is_trained_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--run.steps=3", "--tasks.eval-tasks=0")
    place, finish = tiny_place(config), Journal.finish
    accepted: list[int] = []

    def filling(journal: Journal, dispatch: Any, **values: Any) -> Any:
        if len(accepted) >= 3:
            raise StorageFullError("the journal cannot grow (disk is full); free space on its disk")
        accepted.append(dispatch.index)
        return finish(journal, dispatch, **values)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", filling)
        with pytest.raises(StorageFullError, match="the journal cannot grow"):
            go_on(config, place)
    ended = go_on(config, rundir.reopen(tmp_path, ""))
    dropped = sum(ended.summary.groups_not_trained.get(each, 0) for each in ("zero_advantage",))
    trained = {index for groups in consumption(ended.path).values() for index in groups}

    assert ended.summary.steps == 3
    assert len(set(accepted) - trained) <= dropped
    assert (ended.summary.account_open_tokens, ended.summary.groups_open, ended.summary.drift_tokens) == (0, 0, 0)


def test_a_row_that_finds_no_room_costs_the_steps_since_the_last_checkpoint_and_leaves_no_token_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--run.steps=3", "--run.checkpoint-every=5", "--tasks.eval-tasks=0")
    place, write, rows, notes = tiny_place(config), JsonLines.write, list[int](), Notes()

    def full(sink: JsonLines, row: Row) -> None:
        if row.step == 0:  # the evaluation, of nothing
            return write(sink, row)
        rows.append(row.step)
        raise StorageFullError("metrics.jsonl cannot grow; free space on its disk")

    with monkeypatch.context() as patched, contextlib.closing(place):
        patched.setattr(JsonLines, "write", full)
        with pytest.raises(StorageFullError, match="metrics"):
            play_run(config, place, notes, lambda trainer: None)
    assert rows == [1], "known once the second step is done"
    assert "step 2 is not saved: the row of step 1 is not written" in notes.lines
    ended = go_on(config, rundir.reopen(tmp_path, ""))

    assert [row["step"] for row in read_metrics(ended.path)] == [0, 1, 2, 3]
    assert (ended.summary.steps, ended.summary.account_open_tokens, ended.summary.groups_open) == (3, 0, 0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--agent.kind=process", "--agent.command", "no-such-agent"], "is not an executable file and not on PATH"),
        (["--agent.kind=worker", "--agent.command", "false"], "ended with status 1; its stderr is empty"),
        (["--agent.kind=process", "--agent.command", "false"], "16 episodes in a row ended without a call"),
    ],
)
def test_an_agent_program_that_cannot_play_ends_the_run_with_its_own_words(
    tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(AgentError) as caught:
        play(tmp_path, "--tasks.eval-tasks=0", *overrides)
    assert sentence in str(caught.value)


def test_an_agent_that_never_answers_is_cut_off_counted_and_waited_for_no_longer_than_allowed(tmp_path: Path) -> None:
    overrides = ["--agent.function=tests.run.tiny_agent:never", "--agent.deadline-s=0.4", "--pool.take-timeout-s=2"]
    with pytest.raises(ForgejaxError, match="no group could be taken for 2 s"):
        play(tmp_path, "--tasks.eval-tasks=0", "--stop-policy.deadline=drop_group", *overrides)
    with contextlib.closing(Journal.open(f"sqlite:///{tmp_path}/tiny-1/journal.sqlite")) as journal:
        failed = [group.reason for group in journal.groups() if group.state == "failed"]
        tokens = journal.untrained_tokens()

    assert failed.count("deadline") >= 4
    assert tokens["deadline"] >= 4 * GROUP


def test_an_agent_that_fails_after_its_first_call_ends_the_run_by_its_own_words(tmp_path: Path) -> None:
    config, notes = tiny_config(tmp_path, "--agent.function=tests.run.tiny_agent:crash", "--run.steps=3"), Notes()
    with contextlib.closing(tiny_place(config)) as place, pytest.raises(TrainingError) as raised:
        play_run(config, place, notes, lambda trainer: None)
    said = str(raised.value)

    assert "groups in a row were dropped (too_few_members 8), so there is nothing to train on" in said
    assert (
        "the agent or what it works in is at fault, not the tasks: of 32 episodes 32 failed (agent_failed 32)" in said
    )
    assert "agent function crash raised RuntimeError: the calculator is gone" in said and "tiny_agent.py" in said
    (alarm,) = [line for line in notes.lines if line.startswith("ALARM")]
    assert "16 episodes 16 failed" in alarm and "the calculator is gone" in alarm


def test_an_evaluation_that_is_broken_off_is_not_kept_and_all_that_was_drawn_for_it_is_accounted_for(
    tmp_path: Path,
) -> None:
    config = tiny_config(tmp_path, "--tasks.eval-tasks=60", "--agent.function=tests.run.tiny_agent:never")
    place = tiny_place(config)

    def stop_once_it_draws(trainer: Trainer) -> None:
        evaluate = trainer.service.evaluate

        def watched(tasks: Any, owner: str) -> Any:
            threading.Thread(target=wait, args=(trainer.engines.account().sampled,), daemon=True).start()
            return evaluate(tasks, owner)

        def wait(before: int) -> None:
            while trainer.engines.account().sampled < before + 20:
                time.sleep(0.01)
            trainer.stop()

        trainer.service.evaluate = watched  # type: ignore[method-assign]

    with contextlib.closing(place):
        outcome = play_run(config, place, Notes(), stop_once_it_draws)
    not_trained = outcome.account.tokens_not_trained

    assert (outcome.before, outcome.finished, outcome.steps) == (None, False, 0)
    assert not_trained["evaluation"] + not_trained.get("cancelled", 0) >= 20
    assert outcome.account.tokens_sampled == sum(not_trained.values())
    assert outcome.sums.wall_s < 60, "no episode was waited for"
    assert (rundir.checkpoints_of(place.path) / "0").is_dir(), "the supervised phase is not lost"


def test_an_evaluation_in_the_midst_of_training_that_was_broken_off_is_made_up_for_by_the_resume(
    tmp_path: Path,
) -> None:
    config = tiny_config(tmp_path, "--run.steps=3", "--tasks.eval-tasks=4")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, eval_every=2))
    place = tiny_place(config)

    def stop_in_the_second(trainer: Trainer) -> None:
        evaluate = trainer.service.evaluate

        def watched(tasks: Any, owner: str) -> Any:
            if trainer.step == 2:
                trainer.stop()
            return evaluate(tasks, owner)

        trainer.service.evaluate = watched  # type: ignore[method-assign]

    with contextlib.closing(place):
        outcome = play_run(config, place, Notes(), stop_in_the_second)
    assert (outcome.finished, outcome.steps, outcome.eval_tasks) == (False, 2, 4)
    assert [row["step"] for row in read_metrics(place.path) if "eval/outcome" in row] == [0]
    go_on(config, rundir.reopen(tmp_path, ""))
    assert [row["step"] for row in read_metrics(place.path) if "eval/outcome" in row] == [0, 2, 3]


def test_a_worker_that_is_killed_costs_no_task_of_an_evaluation_and_does_not_end_the_run(tmp_path: Path) -> None:
    worker = [sys.executable, str(REPOSITORY / "tests" / "run" / "tiny_agent.py")]
    config = tiny_config(tmp_path, "--agent.kind=worker", "--agent.command", *worker, "--tasks.eval-tasks=40")
    place, killed = tiny_place(config), []

    def kill_while_it_is_evaluated(trainer: Trainer) -> None:
        evaluate = trainer.service.evaluate

        def watched(tasks: Any, owner: str) -> Any:
            threading.Thread(target=kill, args=(trainer.engines.account().sampled,), daemon=True).start()
            return evaluate(tasks, owner)

        def kill(before: int) -> None:
            while trainer.engines.account().sampled < before + 40:
                time.sleep(0.005)
            killed.extend(end_descendants("tiny_agent"))

        trainer.service.evaluate = watched  # type: ignore[method-assign]

    with contextlib.closing(place):
        outcome = play_run(config, place, Notes(), kill_while_it_is_evaluated)
    assert outcome.before is not None and outcome.after is not None and len(killed) >= 2
    for evaluated in (outcome.before, outcome.after):
        assert (evaluated.result.overall.tasks, evaluated.result.overall.masked) == (40, 0)
    assert (outcome.finished, outcome.steps, outcome.eval_tasks) == (True, 2, 40)
    assert outcome.account.tokens_sampled == outcome.account.tokens_trained + sum(
        outcome.account.tokens_not_trained.values()
    )


def end_descendants(word: str) -> list[int]:
    """Kills the processes below this one whose command line has this word, and gives their ids."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and word in (path / "cmdline").read_text():
                os.kill(int(path.name), signal.SIGKILL)
                found.append(int(path.name))
    return found
