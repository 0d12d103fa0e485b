"""Windows by position: how far up its path a token sees, whatever lies between the two in the row. On the host.

With a window query i sees its ancestor j iff, moreover, ``pos[i] - pos[j] < window``. Positions are depths in the tree:
they rise by 1 from a token to its children. So what i sees begins with one of its ancestors, and since the indices of
ancestors rise with their depth, the condition is ``j >= first_seen[i]``: one integer a query.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int


def windows(
    end_BS: Int[np.ndarray, "B S"],
    window: int,
    positions: Int[np.ndarray, "B S"] | None,
    queries_BS: Bool[np.ndarray, "B S"],
) -> Int[np.ndarray, "B S"]:
    """The index of the first key that each token sees: itself, or its ancestor ``window - 1`` above it or at the root.

    Args:
        end_BS: of every key, see ``tree_meta``.
        window: how many tokens of its path a token sees, itself included.
        positions: of every key; may begin above 0.
        queries_BS: whose positions are held against those of their parents. Others may be padding between a trunk's
            keys and the queries, which looks like leaves of the trunk and may have any position.

    Raises:
        ValueError: the window is less than 1, positions are missing or are no depths in these trees.
    """
    if window < 1:
        raise ValueError(f"a window of {window} tokens: expected at least 1, the token itself; None is no window")
    if positions is None or positions.shape != end_BS.shape:
        found = "none" if positions is None else f"positions of shape {positions.shape}"
        raise ValueError(
            f"a window goes by position, got {found}: pass the depth in its tree of every key, in the shape of end, "
            f"{end_BS.shape}"
        )
    first_seen_BS = np.empty_like(end_BS, np.int32)
    for row, end_S in enumerate(end_BS):
        depth_S = _depths(end_S)
        _check_positions(row, depth_S, positions[row], queries_BS[row])
        first_seen_BS[row] = _ancestors(depth_S, np.maximum(depth_S - window + 1, 0))
    return first_seen_BS


def blocks_in_windows(
    end_S: Int[np.ndarray, " S"], first_seen_S: Int[np.ndarray, " S"], block_size: int
) -> Bool[np.ndarray, "N N"]:
    """[a, b]: whether a token of block a sees one of block b through its window.

    The tokens less deep than all before them in their block decide. All that such a token's followers, up to the next
    one, have for ancestors in earlier blocks are its own ancestors too; it is as deep as the least deep of them, so its
    window reaches as far up as any. From each a walk goes up to the nearest ancestor in an earlier block, and on from
    there until it leaves the window: one step a pair of blocks.
    """
    n_blocks = len(end_S) // block_size
    depth_NS = _depths(end_S).reshape(n_blocks, block_size)
    least_NS = np.minimum.accumulate(depth_NS, axis=1)
    above_S = _ancestors(depth_NS.ravel(), least_NS.ravel() - 1)  # the nearest ancestor in an earlier block
    deciding_NS = np.diff(least_NS, axis=1, prepend=len(end_S)) < 0
    seen_NN = np.eye(n_blocks, dtype=np.bool_)
    query = np.flatnonzero(deciding_NS)
    key = above_S[query]
    while len(query):
        inside = key >= first_seen_S[query]  # not so of -1, above the root
        query, key = query[inside], key[inside]
        seen_NN[query // block_size, key // block_size] = True
        key = above_S[key]
    return seen_NN


def _depths(end_S: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """How many ancestors each token has: of those before it, all whose subtrees have not ended."""
    ended = np.cumsum(np.bincount(end_S, minlength=len(end_S)))[: len(end_S)]
    return np.arange(len(end_S)) - ended


def _ancestors(depth_S: Int[np.ndarray, " S"], wanted_S: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """The index of each token's ancestor at a depth of at most its own, -1 at depths below 0.

    In pre-order that is the last token of this depth up to the token itself: whatever follows it is deeper until its
    subtree has ended.
    """
    S, index_S = len(depth_S), np.arange(len(depth_S))
    by_depth = np.sort(depth_S * S + index_S)
    found = by_depth[np.searchsorted(by_depth, wanted_S * S + index_S, side="right") - 1] % S
    return np.where(wanted_S < 0, -1, found)


def _check_positions(
    row: int, depth_S: Int[np.ndarray, " S"], position_S: Int[np.ndarray, " S"], query_S: Bool[np.ndarray, " S"]
) -> None:
    parent_S = _ancestors(depth_S, depth_S - 1)
    wrong = np.flatnonzero(query_S & (parent_S >= 0) & (position_S != position_S[parent_S] + 1))
    if len(wrong):
        at, parent = int(wrong[0]), int(parent_S[wrong[0]])
        raise ValueError(
            f"token {at} of row {row} has position {position_S[at]} and its parent, token {parent}, "
            f"{position_S[parent]}: a window goes by depth in the tree, not by place in the row; "
            "give a token's children the position after its own"
        )
