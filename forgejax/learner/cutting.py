"""Cutting a tree that is too large for a row into ranges of its samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from forgejax.learner.samples import Sample


def cut(
    samples: Sequence[Sample], shared_S: Int[np.ndarray, " S"], max_tokens: int, max_terms: int
) -> list[tuple[int, int]]:
    """The contiguous ranges [start, stop) of samples, in DFS order, whose trees take the fewest tokens in all.

    The tree of samples a..b-1 has ``L_a + sum(L_i - shared_i, a < i < b)`` nodes: each range repeats the ancestors of
    its first sample, and a prefix computed twice stays exact. Dynamic programming over the end of the last range; of
    equal costs the fewer ranges win.

    Args:
        samples: in DFS order; each fits into ``max_tokens`` by itself.
        shared_S: nodes that sample i shares with sample i - 1.
        max_tokens: bound on the nodes, and on the edges, of a range's tree.
        max_terms: bound on its trained tokens.
    """
    count = len(samples)
    fed = np.array([sample.fed_tokens for sample in samples], np.int64)
    terms = np.array([len(sample.token_ids) for sample in samples], np.int64)
    ends = np.array([1] + [not _identical(*pair) for pair in itertools.pairwise(samples)], np.int64)
    temperatures = len({sample.temperature for sample in samples})
    best = np.full((count + 1, 2), np.iinfo(np.int64).max // 2)  # tokens, ranges
    best[0] = 0
    start_of = np.zeros(count + 1, np.int64)
    for stop in range(1, count + 1):
        grown = trained = last = 0  # new nodes of samples start+1..stop-1; their distinct ends; terms of start..stop-1
        for start in range(stop - 1, -1, -1):
            tokens = fed[start] + grown
            trained += terms[start]
            # An edge leads to a node, or to the last token of a sample, once for each temperature.
            edges = min(trained, (tokens + 1 + last) * temperatures)
            if tokens <= max_tokens and edges <= max_tokens and trained <= max_terms:
                cost = best[start] + (tokens, 1)
                if tuple(cost) < tuple(best[stop]):
                    best[stop], start_of[stop] = cost, start
            grown += fed[start] - shared_S[start]
            last += ends[start]
            if grown > max_tokens or trained > max_terms:
                break
    ranges = []
    stop = count
    while stop:
        ranges.append((int(start_of[stop]), stop))
        stop = int(start_of[stop])
    return ranges[::-1]


def _identical(a: Sample, b: Sample) -> bool:
    return int(a.token_ids[-1]) == int(b.token_ids[-1]) and np.array_equal(a.fed_ids, b.fed_ids)
