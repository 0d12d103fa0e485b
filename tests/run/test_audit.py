"""The audit: what is trained is what was sampled, token for token, and a difference is counted."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from forgejax.learner import PackConfig, Sample, pack
from forgejax.report.final.invariants import check_invariants
from forgejax.report.final.summary import read_summary
from forgejax.rollout import DrawnRequest, LocalEngines
from forgejax.run.account import RunSums
from forgejax.run.audit import Audit
from forgejax.run.conclude import window_bounds
from forgejax.types import SamplingLaw
from tests.run.tiny_run import GROUP, Ended, logged_tokens, play

pytestmark = pytest.mark.usefixtures("compiled_once")
PACKING = PackConfig(row_length=32, block_size=32, rows=1)


def drawn(name: str, old_logp: list[float], versions: list[int], oldest: list[int]) -> Sample:
    """A sample with a context of one token; the ids differ by name, so that nothing merges."""
    return Sample(
        request_id=name,
        context_ids=np.array([ord(name)], np.int32),
        token_ids=np.arange(len(old_logp), dtype=np.int32),
        old_logp=np.array(old_logp, np.float32),
        versions=np.array(versions, np.int32),
        oldest_versions=np.array(oldest, np.int32),
        advantage=1.0,
    )


class Records:
    """Engines as the audit knows them: their records."""

    damaged_requests = 0

    def __init__(self, **records: tuple[list[int], list[int]]) -> None:
        self._records = records

    def requests_of(self, request_ids: Iterable[str]) -> Mapping[str, DrawnRequest]:
        return {
            name: DrawnRequest(prompt_ids=np.array(prompt, np.int32), sampled_ids=np.array(sampled, np.int32))
            for name, (prompt, sampled) in self._records.items()
            if name in request_ids
        }


def test_an_id_that_differs_from_the_engines_record_counts_and_a_missing_record_counts_whole() -> None:
    samples = [drawn(name, [-1.0] * 3, [0] * 3, [0] * 3) for name in ("a", "b", "c")]
    engines = Records(a=([ord("a")], [0, 1, 2]), b=([ord("b")], [0, 7, 2]))
    audit = Audit(
        learner=cast(Any, None),
        engines=cast(Any, engines),
        packing=PACKING,
        law=SamplingLaw(),
        sums=RunSums(drift_tokens=10),
    )
    audit.compare_ids(pack([samples], PACKING))

    assert (audit.sums.drift_tokens, audit.sums.unaudited_tokens) == (10 + 0 + 1 + 4, 0)
    engines.damaged_requests = 1  # and so "c" may have had a record
    audit.compare_ids(pack([samples], PACKING))

    assert (audit.sums.drift_tokens, audit.sums.unaudited_tokens) == (15 + 1, 3)


def test_probes_ask_with_the_prompts_that_were_trained_and_are_told_apart_by_their_owner() -> None:
    packed = pack([[drawn(name, [-1.0], [0], [0]) for name in "abcdef"]], PACKING)
    law = SamplingLaw(temperature=0.5)
    audit = Audit(learner=cast(Any, None), engines=cast(Any, Records()), packing=PACKING, law=law, sums=RunSums())
    probes = audit.probes(packed, "probe-2.7", 2)

    assert [probe.request_id for probe in probes] == [f"probe-2.7-{number}" for number in range(4)]
    assert [probe.prompt_ids.tolist() for probe in probes] == [
        [ord(placement.request_id)] for placement in packed.placements[:4]
    ]
    asked = {(probe.law, probe.purpose, probe.max_tokens, probe.owner) for probe in probes}
    assert asked == {(law, "probe", 16, "probe-2.7")}


def test_what_was_trained_is_what_was_sampled(ended: Ended) -> None:
    summary = read_summary(ended.path)

    assert summary.drift_tokens == 0
    assert summary.logprob_gap_tokens > 100
    assert summary.logprob_gap_max is not None and 0.0 <= summary.logprob_gap_max <= 1e-4
    assert sum(logged_tokens(ended.path, "train")) >= summary.tokens_trained


def test_ids_that_differ_from_the_engines_records_are_counted_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests_of, altered = LocalEngines.requests_of, []

    def corrupt(engines: LocalEngines, request_ids: Iterable[str]) -> Mapping[str, DrawnRequest]:
        found = {}
        for name, record in requests_of(engines, request_ids).items():
            altered.append(name)
            ids = record.sampled_ids.copy()
            ids[0] += 1
            found[name] = dataclasses.replace(record, sampled_ids=ids)
        return found

    monkeypatch.setattr(LocalEngines, "requests_of", corrupt)
    ended = play(tmp_path, "--tasks.eval-tasks=0")

    assert ended.summary.drift_tokens == len(altered) >= 2 * GROUP
    found = {each.name: each.holds for each in check_invariants(ended.summary, window_bounds(ended.config))}
    assert found["Token drift"] is False
