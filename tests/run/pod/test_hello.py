"""Processes that are no one job are told apart before they compute anything."""

import dataclasses
from pathlib import Path

import pytest

from forgejax.run.pod.hello import Hello, digest_sources, find_difference

LEADER = Hello(
    process=0,
    config={"run": {"steps": 10, "seed": 0}, "mesh": {"name": "v5e-64"}},
    code="aa",
    versions={"jax": "1.0"},
    host="host-0",
    clock=1000.0,
)
OTHER = dataclasses.replace(LEADER, process=3, host="host-3")


def test_equal_processes_are_one_job_whatever_host_they_are_on() -> None:
    assert find_difference(LEADER, OTHER, now=1000.0) == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"code": "bb"}, "process 3 on host-3 runs other code (bb) than the leader on host-0 (aa)"),
        (
            {"config": {"run": {"steps": 20, "seed": 0}, "mesh": {"name": "v5e-64"}}},
            "run.steps 10 on host-0 and 20 on host-3",
        ),
        ({"versions": {"jax": "1.1"}}, "jax 1.1, not 1.0"),
        ({"clock": 1090.0}, "is +90 s from the leader's"),
    ],
)
def test_what_differs_is_named_with_both_hosts(changes: dict, told: str) -> None:
    sentence = find_difference(LEADER, dataclasses.replace(OTHER, **changes), now=1000.0)
    assert told in sentence and "host-0" in sentence


def test_the_code_is_told_from_other_code_by_any_byte_and_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = digest_sources(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    second = digest_sources(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, digest_sources(tmp_path)}) == 3
