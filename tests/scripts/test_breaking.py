"""The campaign's own bookkeeping: what an end has hit, what of it is kept, and the table that is made of it."""

import io
from pathlib import Path

import pytest
from _attempts import find_phase
from _audit_run import list_unfinished
from _results import Result, append_result, lay_table, read_results

from forgejax.report.live.lines import LinesProgress


def result(number: int, **fields: object) -> Result:
    given = {"kind": "SIGINT", "hit": ("training",), "closed": True, "took_s": float(number), "wrong": ()} | fields
    common = {"number": number, "what": "ends", "steps": (3, 4), "whole_s": 5.0, "commit": "abc"}
    return Result(**common, **given)  # type: ignore[arg-type]


def test_results_come_back_and_are_counted_by_kind_and_by_what_they_hit(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert read_results(file) == []
    kept = [result(1), result(2, hit=("evaluating", "saving")), result(3, closed=False, wrong=("2 open tokens",))]
    for each in kept:
        append_result(file, each)
    assert read_results(file) == kept
    assert kept[2].describe() == "3: SIGINT while training, in 3.0 s, step 3 -> 4: 2 open tokens"
    kept.append(result(4, kind="SIGTERM", hit=("evaluating",)))
    assert list(lay_table(kept))[2:] == [
        "| **ends** | 4 | 2 | 1 | 2 | 3 | 1 | 2.5, 4.0 |",
        "| SIGINT | 3 | 1 | 1 | 2 | 2 | 1 | 2.0, 3.0 |",
        "| SIGTERM | 1 | 1 | 0 | 0 | 1 | 0 | 4.0, 4.0 |",
    ]


@pytest.mark.parametrize("ended", ["done", "failed"])
def test_the_phase_that_was_hit_is_read_from_what_a_run_tells(ended: str) -> None:
    told = io.StringIO()
    progress = LinesProgress(told, steps=5)
    phases = []

    def look() -> None:
        progress._outlet.close()  # waits until all is written, and takes nothing more
        phases.append(find_phase(told.getvalue()))

    with progress.phase("training", "5 steps"):
        with progress.phase("evaluating", "12 held-out tasks after step 3"):
            progress.note("compiling: nothing is, this is a note ...")
        if ended == "failed":
            with pytest.raises(ValueError, match="x"), progress.phase("reporting"):
                raise ValueError("x")
        look()
    assert phases == ["training"]
    assert find_phase("[   0.0s] loading: tokenizer and tasks ...\n[  1m03s] loading done in 1m03s\n") == "starting"
    assert find_phase("[   0.0s] warm start: 30 supervised steps ...\n") == "warm start"
    assert (
        find_phase("[1h00m] evaluating: 12 tasks ...\n[1h01m] evaluating: 12 tasks, for 30s so far\n") == "evaluating"
    )


def test_a_checkpoint_is_unfinished_until_it_has_its_checksums(tmp_path: Path) -> None:
    assert list_unfinished(tmp_path) == set()
    for name in ("3", "6.orbax-checkpoint-tmp", "damaged-2"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert {name for name, _ in list_unfinished(tmp_path)} == {"3", "6.orbax-checkpoint-tmp"}
    (tmp_path / "checkpoints" / "3" / "checksums.json").touch()
    assert {name for name, _ in list_unfinished(tmp_path)} == {"6.orbax-checkpoint-tmp"}
