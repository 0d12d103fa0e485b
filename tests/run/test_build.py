"""A run is put together from its configuration."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from forgejax.errors import CheckpointError
from forgejax.report.sinks import Row
from forgejax.report.sinks.jsonl import JsonLines
from forgejax.rollout import RequestLog
from forgejax.run.build import BEFORE_FILE, _missed_evaluation, play_run
from forgejax.run.conclude import summarise
from forgejax.run.loop import Trainer
from tests.run.tiny_run import REPOSITORY, Ended, Notes, tiny_config, tiny_place


@pytest.mark.parametrize(
    ("figures", "missed"),
    [({"learner/loss": 0.5}, True), ({"eval/outcome": 0.5}, False), ({"eval/failed_share": 1.0}, False)],
)
def test_an_evaluation_that_scored_nothing_is_one_all_the_same(
    tmp_path: Path, figures: dict[str, float], missed: bool
) -> None:
    config = tiny_config(tmp_path, "--run.eval-every=2", "--run.steps=6")
    with contextlib.closing(tiny_place(config)) as place:
        with contextlib.closing(JsonLines(place.path)) as rows:
            rows.write(Row(step=2, values=figures, at=0.0))
        assert _missed_evaluation(config, place, 2) is missed
        assert _missed_evaluation(config, place, 4) and not _missed_evaluation(config, place, 3)


def test_a_damaged_first_evaluation_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    with contextlib.closing(tiny_place(config)) as place:
        (place.path / BEFORE_FILE).write_text("{")
        monkeypatch.setattr("forgejax.run.build.build", None)
        with pytest.raises(CheckpointError, match=r"evaluation-before\.json is damaged: .*; delete it"):
            play_run(config, place, Notes(), lambda _: None)


def test_a_taken_port_is_no_obstacle_and_the_one_chosen_is_told(ended: Ended) -> None:
    line = next(line for line in ended.notes if line.startswith("the gateway listens at http://127.0.0.1:"))
    port = int(line.removeprefix("the gateway listens at http://127.0.0.1:").split("/")[0])

    assert port != ended.config.gateway.port


def find_servers(folder: Path) -> list[int]:
    """The processes of the servers of the run in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes()
            if b"forgejax.run.serving.program" in words and str(folder).encode() in words:
                found.append(int(path.name))
    return sorted(found)


@pytest.mark.timeout(400)
def test_a_run_goes_on_when_one_of_its_two_servers_is_killed_and_leaves_nothing_open_or_running(
    tmp_path: Path, compiled_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled_once))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    config = tiny_config(tmp_path, "--rollout.engines=2", "--run.steps=4", "--tasks.eval-tasks=0")
    place = tiny_place(config)
    killed: list[int] = []

    def kill_after_the_first_step(trainer: Trainer) -> None:
        publish = trainer._publish

        def publish_and_kill() -> None:
            publish()
            if not killed:
                killed.extend(find_servers(place.path))
                os.kill(killed[0], signal.SIGKILL)

        trainer._publish = publish_and_kill  # type: ignore[method-assign]

    with contextlib.closing(place):
        outcome = play_run(config, place, Notes(), kill_after_the_first_step)
    summary = summarise(outcome, config)
    assert len(killed) == 2 and find_servers(place.path) == []
    assert (summary.steps, summary.drift_tokens, summary.account_open_tokens, summary.groups_open) == (4, 0, 0, 0)
    logs = [RequestLog(place.path / "engines" / number / "requests.log") for number in "01"]
    assert min(log.inherited.sampled for log in logs) > 0
    lost = summary.tokens_not_trained.get("lost_replica", 0)
    assert 0 <= summary.tokens_sampled - sum(log.inherited.sampled for log in logs) <= lost
    for log in logs:
        log.close()
