"""The audit: is what is trained what the engines were given and drew, and do both sides agree on its probability?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from forgejax.learner import Learner, PackConfig, PackedStep, Sample, count_drift, pack
from forgejax.learner.gap import find_fresh
from forgejax.learner.packing.drift import read_trained_ids
from forgejax.learner.packing.samples import find_untrainable_reason, make_turn_sample
from forgejax.rollout import Engines
from forgejax.run.account import RunSums
from forgejax.types import Completion, SampleRequest, SamplingLaw, Turn

_PROBES = 4
_PROBE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Compares the trainer with the engines and adds what it finds to ``sums``; for the training thread alone.

    ``law`` is the one that trained tokens are drawn from.
    """

    learner: Learner
    engines: Engines
    packing: PackConfig
    law: SamplingLaw
    sums: RunSums

    def compare_ids(self, packed: PackedStep) -> None:
        """Counts the ids of a trained step that differ from the engines' own records of its requests.

        Of a request that was cancelled, the engine may have drawn more than whoever asked was given in time. Where as
        many records were found damaged as the step lacks, its requests without one are counted apart: what is said of
        them is that nothing is known.
        """
        wanted = {each.request_id: each.stop - each.start for each in packed.placements}
        records = self.engines.requests_of(wanted)
        given = {
            name: (record.prompt_ids, record.sampled_ids[: wanted[name]] if record.cut else record.sampled_ids)
            for name, record in records.items()
        }
        missing = wanted.keys() - given.keys()
        excused = missing if len(missing) <= self.engines.damaged_requests else set()
        self.sums.drift_tokens += count_drift(packed, given, excused)
        self.sums.unaudited_tokens += sum(
            placement.stop - placement.start for placement in packed.placements if placement.request_id in excused
        )

    def measure_gap(self, turns: Iterable[Turn], version: int) -> None:
        """Scores what the sampler drew with the learner's current weights, of ``version``."""
        samples: list[Sample] = [
            make_turn_sample(turn, 1.0)
            for turn in turns
            if len(turn.completion.token_ids) and find_untrainable_reason(turn, self.packing) is None
        ]
        if samples:
            packed = pack([samples], self.packing, row_shards=self.learner.row_shards)
            scored = [np.asarray(scores) for scores in self.learner.score(packed)]
            self.sums.count_gaps(*find_fresh(scored, packed, version))

    def probes(self, packed: PackedStep, owner: str, step: int) -> list[SampleRequest]:
        """Requests for a few completions of prompts the step trained on, so that a gap is never measured on nothing.

        Their ids begin with ``owner``.
        """
        parts = packed.parts
        return [
            SampleRequest(
                request_id=f"{owner}-{number}",
                prompt_ids=read_trained_ids(parts[placement.batch], placement)[0],
                max_tokens=_PROBE_TOKENS,
                law=self.law,
                seed=step * _PROBES + number,
                purpose="probe",
                owner=owner,
            )
            for number, placement in enumerate(packed.placements[:_PROBES])
        ]

    def measure_probes(self, completions: Sequence[Completion], version: int) -> None:
        """The gap on what was drawn for the probes."""
        self.measure_gap(
            (
                Turn(index=0, completion=each, parent=None, requested_at=0.0, finished_at=0.0, requested_law=self.law)
                for each in completions
            ),
            version,
        )
