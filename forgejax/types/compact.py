"""Token ids in few bytes: narrow integers, and each prompt as what it adds to an earlier sequence.

A *sequence* is what the policy has seen once a request is over: the prompt's ids and those drawn after it. An agent's
next prompt nearly always begins with an earlier sequence of its session, or with a part of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from forgejax.types.sampling import TokenIds

_SHORT, _MEDIUM = 2**16, 2**24
_LEAST_SHARED = 8  # below this a reference costs more than it saves
_FIRST_BLOCK = 256
_Key = TypeVar("_Key")


def pack_ids(ids_T: TokenIds) -> bytes:
    """The ids in 2, 3 or 4 bytes each, as their largest asks for; one byte before them says which."""
    ids_T = np.asarray(ids_T, np.int32)
    low, high = (int(ids_T.min()), int(ids_T.max())) if len(ids_T) else (0, 0)
    if low < 0 or high >= _MEDIUM:
        return b"\x04" + ids_T.astype("<i4", copy=False).tobytes()
    if high < _SHORT:
        return b"\x02" + ids_T.astype("<u2").tobytes()
    return b"\x03" + ids_T.astype("<u2").tobytes() + (ids_T >> 16).astype(np.uint8).tobytes()


def unpack_ids(packed: bytes | memoryview) -> TokenIds:
    """What ``pack_ids`` was given, as int32. Raises ValueError for bytes that it cannot have made."""
    width, size = packed[0] if packed else 0, len(packed) - 1
    if width not in (2, 3, 4) or size % width:
        raise ValueError(f"{size + 1} bytes that begin with {width} are no packed token ids")
    count = size // width
    if width == 4:
        return np.frombuffer(packed, "<i4", offset=1).astype(np.int32)
    ids_T = np.frombuffer(packed, "<u2", count, offset=1).astype(np.int32)
    if width == 3:
        ids_T |= np.frombuffer(packed, np.uint8, count, offset=1 + 2 * count).astype(np.int32) << 16
    return ids_T


def count_shared(a: TokenIds, b: TokenIds) -> int:
    """How many ids two sequences have in common from their start."""
    size, start = min(len(a), len(b)), 0
    for stop in (min(_FIRST_BLOCK, size), size):  # most sequences differ soon, or not at all
        differ = a[start:stop] != b[start:stop]
        if differ.any():
            return start + int(differ.argmax())
        start = stop
    return size


@dataclass(frozen=True, kw_only=True, eq=False)
class Tip(Generic[_Key]):
    """A sequence that no later one contains, under the key of its request."""

    key: _Key
    prompt_ids: TokenIds
    sampled_ids: TokenIds

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.sampled_ids)

    def share(self, prompt_ids: TokenIds) -> int:
        """With how many of this sequence's ids a prompt begins."""
        own = len(self.prompt_ids)
        shared = count_shared(self.prompt_ids, prompt_ids)
        return own + count_shared(self.sampled_ids, prompt_ids[own:]) if shared == own else shared


class Tips(Generic[_Key]):
    """The tips of one session's tree of sequences; the ``limit`` newest are remembered. For one thread at a time."""

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._tips: list[Tip[_Key]] = []

    @property
    def ids(self) -> int:
        """How many ids are held."""
        return sum(len(tip) for tip in self._tips)

    def add(self, tip: Tip[_Key]) -> tuple[_Key | None, int]:
        """Adds a sequence: the key of the earlier one that its prompt has most in common with, and how many ids.

        None and 0 where that is next to nothing.
        """
        shared, parent = max(
            ((each.share(tip.prompt_ids), each) for each in self._tips), key=lambda found: found[0], default=(0, None)
        )
        if parent is None or shared < _LEAST_SHARED:
            parent, shared = None, 0
        elif shared == len(parent):  # whatever begins with the parent begins with the new one as well
            self._tips.remove(parent)
        self._tips = [*self._tips, tip][-self._limit :]
        return (None if parent is None else parent.key), shared
