import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgejax.errors import ConfigError
from forgejax.report.evaluation import NOT_MEASURED, EvaluationResult, LevelResult
from forgejax.report.final.summary import SUMMARY_FILE, make_evaluation_fields, read_summary, write_summary
from tests.report.final.example import summary


def test_a_summary_reads_back_as_it_was_written(tmp_path: Path) -> None:
    given = summary(figures={"attention_pair_ratio": 3.5})
    path = write_summary(tmp_path / "run", given)
    assert path == tmp_path / "run" / SUMMARY_FILE
    assert read_summary(tmp_path / "run") == given
    assert json.loads(path.read_text())["account_open_tokens"] == 0
    assert [entry.name for entry in path.parent.iterdir()] == [SUMMARY_FILE]


def test_the_account_is_computed_and_never_given() -> None:
    assert summary(tokens_sampled=1001).account_open_tokens == 1001 - 1000
    assert summary(groups_dispatched=23).groups_open == 3


def test_numbers_that_are_not_finite_become_none_and_array_scalars_plain_numbers() -> None:
    given = summary(
        logprob_gap_max=math.nan,
        tokens_sampled=np.int64(1000),
        tree_token_ratio=np.float32(2.5),
        figures={"x": math.inf},
    )
    assert given.logprob_gap_max is None and given.figures == {"x": None}
    assert type(given.tokens_sampled) is int and given.tree_token_ratio == 2.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_reward_after", 1.5),
        ("tool_use_before", -0.1),
        ("levels", {"easy": {"tool_use_before": -0.1}}),
        ("steps", -1),
        ("steps", 2.5),
        ("wall_s", math.nan),
        ("tokens_not_trained", {"cancelled": -3}),
    ],
)
def test_an_impossible_figure_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"summary: {name} is"):
        summary(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "ten"}, "not a summary"),
        ({"eval_reward_after": 7}, "not a summary"),
        ({"speed": 1}, r"unknown fields \['speed'\]"),
        ({"tokens_sampled": 999}, "account_open_tokens is 0 but its other figures give -1"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_summary(tmp_path, summary())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_summary(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_a_file_that_is_no_summary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SUMMARY_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="not a summary"):
        read_summary(tmp_path)


def test_a_missing_summary_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"summary\.json could not be used \(No such file"):
        read_summary(tmp_path)


_LEVEL = LevelResult(episodes=4, tasks=4, masked=0, reward=0.5, reward_se=0.25, tool_use=0.75, episode_s=2.0)


def test_levels_are_those_that_were_played() -> None:
    before = EvaluationResult(overall=_LEVEL, levels={"red": _LEVEL, "blue": replace(_LEVEL, reward=0.1)})
    after = EvaluationResult(overall=replace(_LEVEL, reward=0.6), levels={"red": replace(_LEVEL, reward=0.9)})
    given = summary(**make_evaluation_fields(before, after))

    assert (given.eval_reward_before, given.eval_reward_after, given.tool_use_after) == (0.5, 0.6, 0.75)
    assert list(given.levels) == ["red", "blue"]
    assert (given.levels["red"].outcome_before, given.levels["red"].outcome_after) == (0.5, 0.9)
    assert (given.levels["blue"].outcome_before, given.levels["blue"].outcome_after) == (0.1, None)


def test_what_a_run_cannot_have_is_absent_and_not_null(tmp_path: Path) -> None:
    plain = replace(_LEVEL, tool_use=0.0)
    result = EvaluationResult(overall=plain, levels={"default": plain})
    path = write_summary(tmp_path, summary(**make_evaluation_fields(result, NOT_MEASURED)))
    record = json.loads(path.read_text())

    assert "null" not in path.read_text()
    assert record["levels"] == {} and record["eval_reward_before"] == 0.5
    assert {"tool_use_before", "tool_use_after", "eval_reward_after", "eval_gain"}.isdisjoint(record)
    assert read_summary(tmp_path).eval_reward_after is None
