"""A run is put together from its configuration."""

import contextlib
from pathlib import Path

import pytest

from forgejax.report.sinks import Row
from forgejax.report.sinks.jsonl import JsonLines
from forgejax.run.build import _missed_evaluation
from tests.run.tiny_run import Ended, tiny_config, tiny_place


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


def test_a_taken_port_is_no_obstacle_and_the_one_chosen_is_told(ended: Ended) -> None:
    line = next(line for line in ended.notes if line.startswith("the gateway listens at http://127.0.0.1:"))
    port = int(line.removeprefix("the gateway listens at http://127.0.0.1:").split("/")[0])

    assert port != ended.config.gateway.port
