"""Laws of planning from the command line."""

from __future__ import annotations

import json
import os
import sys

import pytest

from forgejax.errors import ConfigError
from forgejax.run.plan import dry_run
from scripts import plan, train
from tests.run.plan.pods import POD, ROOT

_TOKENIZER = f"--tokenizer={ROOT / 'examples/quickstart/tokenizer'}"


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "can_compile", lambda plan: False)


def call_train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.main()


@pytest.mark.parametrize(("option", "code"), [("--engine.kv-pages=1536", 0), ("--engine.kv-pages=99999", 1)])
def test_a_dry_run_exits_by_whether_the_run_fits_and_says_so_to_programs(
    option: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--config", str(POD), _TOKENIZER, option, "--dry-run", "--json")
    assert call_train(monkeypatch, *given) == code
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is (code == 0)
    assert ("nearest" in found) is (code == 1)


def test_json_without_a_dry_run_and_a_dry_run_of_a_run_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (("--json",), ("--dry-run", "--resume")):
        assert call_train(monkeypatch, *given) == 1
        assert "give --dry-run without --resume" in capsys.readouterr().err


def test_meshes_are_ranked_for_a_shape_and_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    options = plan.Options(
        config=POD, policy=ROOT / "examples/shapes/qwen3-8b", context=16_384, batch=2, chips=("v5p",), most=16
    )
    plan.main(options)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["chips", "GiB"]
    assert [int(line.split()[0]) for line in lines] == sorted(int(line.split()[0]) for line in lines)
    assert all("--packing.row-length" not in line or "16384" in line for line in lines)


def test_a_policy_that_no_mesh_holds_is_said_to_be_so() -> None:
    with pytest.raises(ConfigError, match=r"no mesh of up to 1 chips of v5e holds"):
        plan.main(plan.Options(config=POD, chips=("v5e",), most=1))
