"""Cutting samples into ranges whose trees fit into a row."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from forgejax.learner.samples import Sample


def cut(
    samples: Sequence[Sample],
    shared_S: Int[np.ndarray, " S"],
    max_tokens: int,
    max_terms: int,
    fewest: Literal["tokens", "ranges"] = "tokens",
) -> list[tuple[int, int]]:
    """The contiguous ranges [start, stop) of samples with the fewest tokens in all, or with the fewest ranges.

    The tree of samples a..b-1 has ``L_a + sum(L_i - shared_i, a < i < b)`` nodes: each range repeats the ancestors of
    its first sample, and a prefix computed twice stays exact. Of equals the other figure decides. Time and memory are
    linear in the number of samples: what a range may take is monotone in both of its ends, so that dynamic programming
    over the end of the last range looks at the minimum of a sliding window.

    Args:
        samples: in DFS order, of one tree or of trees behind one another; each fits into ``max_tokens`` by itself.
        shared_S: nodes that sample i shares with sample i - 1; 0 where a tree begins.
        max_tokens: bound on the nodes, and on the edges, of a range's trees.
        max_terms: bound on its trained tokens.
        fewest: what is made as small as possible first.
    """
    count = len(samples)
    fed = [sample.fed_tokens for sample in samples]
    grown = _sums(length - int(shared) for length, shared in zip(fed, shared_S, strict=True))
    trained = _sums(len(sample.token_ids) for sample in samples)
    ends = _sums(itertools.chain([1], (not _identical(*pair) for pair in itertools.pairwise(samples))))
    temperatures = len({sample.temperature for sample in samples})

    def fits(start: int, stop: int) -> bool:
        tokens = fed[start] + grown[stop] - grown[start + 1]
        terms = trained[stop] - trained[start]
        # An edge leads to a node that is no root, or to the last token of a sample, once for each temperature.
        edges = min(terms, (tokens + ends[stop] - ends[start + 1]) * temperatures)
        return tokens <= max_tokens and edges <= max_tokens and terms <= max_terms

    best = [(0, 0)]  # tokens and ranges of the first samples, in the order in which they count
    start_of = [0]
    window: deque[tuple[tuple[int, int], int]] = deque()  # ascending: what a range from here costs, less grown[stop]
    for stop in range(1, count + 1):
        start = stop - 1
        offset = _figures(fed[start] - grown[start + 1], 1, fewest)
        cost = (best[start][0] + offset[0], best[start][1] + offset[1])
        while window and window[-1][0] >= cost:
            window.pop()
        window.append((cost, start))
        while not fits(window[0][1], stop):
            window.popleft()
        cost, start = window[0]
        offset = _figures(grown[stop], 0, fewest)
        best.append((cost[0] + offset[0], cost[1] + offset[1]))
        start_of.append(start)
    ranges = []
    stop = count
    while stop:
        ranges.append((start_of[stop], stop))
        stop = start_of[stop]
    return ranges[::-1]


def _sums(values: Iterable[int]) -> list[int]:
    """Running sums: entry i is that of the first i values."""
    return list(itertools.accumulate(values, initial=0))


def _figures(tokens: int, ranges: int, fewest: str) -> tuple[int, int]:
    return (tokens, ranges) if fewest == "tokens" else (ranges, tokens)


def _identical(a: Sample, b: Sample) -> bool:
    if a.fed_tokens != b.fed_tokens or int(a.token_ids[-1]) != int(b.token_ids[-1]):
        return False
    return np.array_equal(a.fed_ids, b.fed_ids)
