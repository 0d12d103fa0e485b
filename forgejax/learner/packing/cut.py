"""Cutting samples into ranges whose trees fit into a row."""

from __future__ import annotations

from collections import deque
from typing import Literal

from forgejax.learner.packing.forest import Forest, Range

_FIRST = 1 << 40  # what the figure that counts first is multiplied by; the other is smaller


def cut_samples(
    forest: Forest,
    whole: Range,
    max_tokens: int,
    max_terms: int,
    fewest: Literal["tokens", "ranges"] = "tokens",
) -> list[Range]:
    """The contiguous ranges [start, stop) of samples with the fewest tokens in all, or with the fewest ranges.

    The tree of samples a..b-1 has ``L_a + sum(L_i - shared_i, a < i < b)`` nodes: each range repeats the ancestors of
    its first sample, and a prefix computed twice stays exact. Of equals the other figure decides. Time and memory are
    linear in the number of samples: what a range may take is monotone in both of its ends, so that dynamic programming
    over the end of the last range looks at the minimum of a sliding window.

    Args:
        forest: each of its samples fits into ``max_tokens`` by itself.
        whole: the samples to cut, of one tree or of trees behind one another.
        max_tokens: bound on the nodes, and on the edges, of a range's trees.
        max_terms: bound on its trained tokens.
        fewest: what is made as small as possible first.
    """
    first, last = whole
    grown = forest.nodes[first : last + 1].tolist()
    trained = forest.terms[first : last + 1].tolist()
    distinct = forest.distinct[first : last + 1].tolist()
    begun = (forest.fed[first:last] - forest.nodes[first + 1 : last + 1]).tolist()  # a range's nodes less its growth
    temperatures = len({sample.temperature for sample in forest.tree.samples[first:last]})
    per_token, per_range = (_FIRST, 1) if fewest == "tokens" else (1, _FIRST)

    def fits(start: int, stop: int) -> bool:
        tokens = begun[start] + grown[stop]
        terms = trained[stop] - trained[start]
        # An edge leads to a node that is no root, or to the last token of a sample, once for each temperature.
        edges = (tokens + distinct[stop] - distinct[start + 1]) * temperatures
        return tokens <= max_tokens and min(terms, edges) <= max_tokens and terms <= max_terms

    best = [0]  # what the first samples cost
    start_of = [0]
    window: deque[tuple[int, int]] = deque()  # ascending: what a range from here costs, less its growth
    for stop in range(1, last - first + 1):
        start = stop - 1
        cost = best[start] + begun[start] * per_token + per_range
        while window and window[-1][0] >= cost:
            window.pop()
        window.append((cost, start))
        while not fits(window[0][1], stop):
            window.popleft()
        cost, start = window[0]
        best.append(cost + grown[stop] * per_token)
        start_of.append(start)
    ranges = []
    stop = last - first
    while stop:
        ranges.append((first + start_of[stop], first + stop))
        stop = start_of[stop]
    return ranges[::-1]
