"""A deterministic run ends in the same bits, weights and optimizer, whatever the clock did and however it was ended."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from forgejax.learner import Learner, Metrics, PackedStep, digest_arrays
from forgejax.run import rundir
from forgejax.run.build import play_run
from forgejax.run.config import TrainConfig
from forgejax.run.loop import Trainer
from forgejax.run.rundir import RunDir
from tests.run.tiny_run import Ended, NotesAndWaits, tiny_config, tiny_place

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 4
OVERRIDES = (
    "--run.deterministic=true",
    f"--run.steps={STEPS}",
    "--run.checkpoint-every=2",
    "--tasks.eval-tasks=4",
    "--agent.function=tests.run.tiny_agent:dawdle",
)


class Crash(BaseException):
    """What nothing in a run catches: no step is saved on its way out."""


def play_digested(config: TrainConfig, place: RunDir) -> tuple[Ended, str]:
    """Plays a run to its end, and gives the digest of weights and optimizer as well."""
    notes, trainers = NotesAndWaits(), list[Trainer]()
    with contextlib.closing(place):
        outcome = play_run(config, place, notes, trainers.append)
    ended = Ended(config=config, path=place.path, outcome=outcome, notes=notes.lines, waits=notes.waits)
    return ended, digest_arrays(trainers[0].learner.state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, compiled_once: Path) -> tuple[Ended, str]:
    """A run that nothing interrupts."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), *OVERRIDES)
    return play_digested(config, tiny_place(config))


def test_two_runs_end_in_the_same_weights_and_the_same_optimizer_and_say_so(
    whole: tuple[Ended, str], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, *OVERRIDES)
    (first, digest), (second, again) = whole, play_digested(config, tiny_place(config))
    ours, theirs = first.summary, second.summary

    assert again == digest
    assert ours.deterministic and ours.params_digest == theirs.params_digest
    assert (ours.eval_reward_after, ours.tokens_trained) == (theirs.eval_reward_after, theirs.tokens_trained)
    assert (ours.staleness_steps_max, ours.window_disorder_max, ours.steps) == (0, 0, STEPS)
    assert (ours.account_open_tokens, ours.groups_open, ours.drift_tokens) == (0, 0, 0)
    assert any("deterministic: 2 groups in flight, in lockstep with the updates" in line for line in first.notes)


def test_a_run_that_is_stopped_and_then_crashes_ends_as_if_it_had_not_once_it_is_resumed(
    whole: tuple[Ended, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash is in the update of version 3: a step is lost, whose groups the journal keeps, and of the next ones
    some are kept and others were cut off."""
    config, update = tiny_config(tmp_path, *OVERRIDES), Learner.update

    def stop_after_the_first(trainer: Trainer) -> None:
        publish = trainer.engines.publish

        def watched(params: Any, version: int) -> None:
            publish(params, version)
            trainer.stop()

        trainer.engines.publish = watched  # type: ignore[method-assign]

    def crash_at_3(learner: Learner, step: PackedStep, version: int) -> Metrics:
        if version == 3:
            raise Crash
        return update(learner, step, version)

    with contextlib.closing(tiny_place(config)) as place:
        outcome = play_run(config, place, NotesAndWaits(), stop_after_the_first)
    assert (outcome.finished, outcome.steps) == (False, 1)
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", crash_at_3)
        with pytest.raises(Crash):
            play_digested(config, rundir.reopen(tmp_path, ""))
    ended, digest = play_digested(config, rundir.reopen(tmp_path, ""))

    assert (outcome.params_digest == ended.summary.params_digest, ended.summary.steps) == (False, STEPS)
    assert (digest, ended.summary.params_digest) == (whole[1], whole[0].summary.params_digest)
    assert any("resumed from the checkpoint of step 2" in line for line in ended.notes)
