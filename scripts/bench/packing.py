"""How long the host takes to merge and pack one optimizer step, and how full and even its rows are."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import tyro

from forgejax.learner import PackConfig, PackedStep, Sample, pack
from forgejax.learner.packing.tree import build_tree

VOCAB = 32_768


class Draw:
    """An endless stream of groups for each shape of agent; lengths vary by a factor of four around their mean.

    Every prompt begins with the same ``system`` tokens.
    """

    def __init__(self, system: int) -> None:
        self.rng = np.random.default_rng(0)
        self.system = self.rng.integers(0, VOCAB, system, dtype=np.int32)

    def ids(self, mean: int) -> np.ndarray:
        low, high = max(1, mean * 2 // 5), max(2, mean * 8 // 5)
        return self.rng.integers(0, VOCAB, self.rng.integers(low, high + 1), dtype=np.int32)

    def sample(self, context: np.ndarray, answer: np.ndarray) -> Sample:
        zeros = np.zeros(len(answer), np.int32)
        return Sample(
            request_id=f"r{self.rng.integers(2**62)}",
            context_ids=context,
            token_ids=answer,
            old_logp=self.rng.normal(-2.0, 0.5, len(answer)).astype(np.float32),
            versions=zeros,
            oldest_versions=zeros,
            advantage=float(self.rng.normal()),
        )

    def grpo(self, prompt: int, answer: int, members: int = 8) -> list[Sample]:
        context = np.concatenate([self.system, self.ids(prompt)])
        return [self.sample(context, self.ids(answer)) for _ in range(members)]

    def turns(self, *, think: int, members: int = 8, turns: int = 8) -> list[Sample]:
        """One sample a turn. Without thinking each prompt extends the last; thinking is stripped from later ones."""
        prompt, group = np.concatenate([self.system, self.ids(256)]), []
        for _ in range(members):
            context = prompt
            for _ in range(turns):
                said = self.ids(48)
                thought = self.ids(think) if think else said[:0]
                group.append(self.sample(context, np.concatenate([thought, said])))
                context = np.concatenate([context, said, self.ids(48)])
        return group


CASES: dict[str, Callable[[Draw], list[Sample]]] = {
    "multiturn": lambda draw: draw.turns(think=0),
    "stripped": lambda draw: draw.turns(think=48),
    "grpo": lambda draw: draw.grpo(256, 64),
    "short": lambda draw: draw.grpo(70, 22),
    "chain": lambda draw: draw.grpo(128, 128, members=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to pack. ``tokens`` are at least reached, whole groups at a time, counted before or after merging;
    ``system`` tokens begin every prompt: all samples are then one tree, which is cut."""

    case: Literal["all", "multiturn", "stripped", "grpo", "short", "chain"] = "all"
    tokens: int = 1_000_000
    count: Literal["unmerged", "tree"] = "tree"
    system: int = 0
    packing: PackConfig = dataclasses.field(default_factory=lambda: PackConfig(row_length=8192, rows=1, block_size=128))
    row_shards: int = 4
    repeats: int = 5
    json: bool = False


def groups_of(options: Options, case: str) -> list[list[Sample]]:
    draw, found, total = Draw(options.system), [], 0
    while total < options.tokens:
        group = CASES[case](draw)
        found.append(group)
        tree = options.count == "tree"
        total += len(build_tree(group).tokens_T) if tree else sum(sample.fed_tokens for sample in group)
    return found


def measured(options: Options, case: str) -> dict[str, Any]:
    groups = groups_of(options, case)
    walls, cpus = [], []
    packed: PackedStep | None = None
    for _ in range(options.repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        packed = pack(groups, options.packing, row_shards=options.row_shards)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    assert packed is not None
    return {
        "case": case,
        "groups": len(groups),
        **{field.name: getattr(packed.stats, field.name) for field in dataclasses.fields(packed.stats)},
        "token_ratio": packed.stats.tree_token_ratio,
        "pair_ratio": packed.stats.attention_pair_ratio,
        "pair_imbalance": packed.stats.pair_imbalance,
        "row_fill": packed.stats.row_fill,
        "batches": len(packed.parts),
        "trunks": len(packed.trunks),
        "shapes": len(
            {tuple(x.shape for x in vars(part.batch).values() if hasattr(x, "shape")) for part in packed.parts}
        ),
        "pack_s": statistics.median(walls[1:]),
        "pack_cpu_s": statistics.median(cpus[1:]),
    }


def results(options: Options) -> Iterator[dict[str, Any]]:
    for case in CASES if options.case == "all" else [options.case]:
        yield measured(options, case)


def main(options: Options) -> None:
    for result in results(options):
        if options.json:
            print(json.dumps({**result, "load": round(os.getloadavg()[0], 2)}))
            continue
        for name, value in result.items():
            print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")


if __name__ == "__main__":
    main(tyro.cli(Options))
