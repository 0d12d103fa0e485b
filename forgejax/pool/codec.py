"""Group <-> bytes, lossless: every array comes back with its dtype, shape and bits.

Layout: 4 bytes of magic and format version, 4 bytes CRC-32 of the body (big endian); then the body: 4 bytes size of the
head (big endian), the head, the columns. The head is ``[sizes of the columns, [dispatch, task, baseline_s],
trajectories]`` in MessagePack. Each trajectory has seven columns, which hold its turns' arrays one behind another, and
each token id once: a prompt is stored as what it adds to the sequence of an earlier turn. In the trajectories nil
stands for each of these arrays. Arrays elsewhere are extension type 1, holding ``[dtype.str, shape, raw bytes in C
order]``. Decoded arrays are read-only, and prompts that continue each other share their memory.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np

from forgejax.errors import DamagedGroupError, PoolError
from forgejax.types import Completion, Dispatch, Group, Task, Trajectory
from forgejax.types.compact import Tip, Tips, pack_ids, unpack_ids

MAGIC = b"FJG\x02"
_ARRAY = 1
_HEADER = len(MAGIC) + 4
_Buffer = bytes | memoryview
_Array = np.ndarray[Any, np.dtype[Any]]


class _Columns(NamedTuple):
    """The arrays of a trajectory's n turns.

    ``places`` [n, 4], int32: the earlier turn of the group whose sequence the prompt begins with (-1: none), how many
    ids of it, how many follow them in the prompt, how many were sampled. ``ids`` holds the latter two of each turn.
    Versions are runs: a value each, and a length each.
    """

    places: _Buffer
    ids: _Buffer
    logprobs: _Buffer
    versions: _Buffer
    version_lengths: _Buffer
    oldest_versions: _Buffer
    oldest_lengths: _Buffer


def encode_group(group: Group) -> bytes:
    """The group as bytes.

    Raises PoolError if it holds a value that would not come back as it was. ``Task.payload`` must hold plain data
    (None, bool, int of 64 bits, float, str, bytes, list, dict with str keys) or arrays; tuples and sets in it come back
    as lists, and dates, decimals and enums as the text or number they are written as. Lone surrogates in an answer or
    an error come back as their escapes.
    """
    try:
        if not all(isinstance(key, str) for key in group.task.payload):
            raise TypeError(f"the keys of its task payload are {list(group.task.payload)}; expected strings")
        columns = [column for each in _make_columns(group) for column in each]
        fields = msgspec.msgpack.encode([group.dispatch, group.task, group.baseline_s], enc_hook=_plain)
        parts = [list(map(len, columns)), msgspec.Raw(fields), msgspec.Raw(_pack_trajectories(group.trajectories))]
        head = msgspec.msgpack.encode(parts)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise PoolError(
            f"group {group.dispatch.index} (task {group.task.id}) cannot be stored: {error}; "
            "put only plain data and numeric arrays into a group and its task payload"
        ) from error
    body = [len(head).to_bytes(4, "big"), head, *columns]
    checksum = functools.reduce(lambda sum_, part: zlib.crc32(part, sum_), body, 0)
    return b"".join([MAGIC, checksum.to_bytes(4, "big"), *body])


def decode_group(data: bytes, *, index: int) -> Group:
    """The group that ``encode_group`` wrote. ``index`` names it in errors. Raises DamagedGroupError."""
    if data[: len(MAGIC)] != MAGIC:
        raise DamagedGroupError(
            f"group {index}: its stored bytes start with {data[:4]!r}, expected {MAGIC!r} (format 2); "
            "they are damaged or written by another version"
        )
    body = memoryview(data)[_HEADER:]
    if zlib.crc32(body) != int.from_bytes(data[len(MAGIC) : _HEADER], "big"):
        raise DamagedGroupError(f"group {index}: its {len(data)} stored bytes do not match their checksum")
    try:
        head_size = 4 + int.from_bytes(body[:4], "big")
        sizes, fields, turns = _HEAD_DECODER.decode(body[4:head_size])
        dispatch, task, baseline_s = _FIELDS_DECODER.decode(fields)
        trajectories = _decode_trajectories(turns, _read_arrays(_split(body[head_size:], sizes)))
    except (msgspec.MsgspecError, ValueError, TypeError, StopIteration) as error:
        raise DamagedGroupError(f"group {index}: its stored bytes are not a group: {error}") from error
    if dispatch.index != index:
        raise DamagedGroupError(f"group {index}: its stored bytes are those of group {dispatch.index}")
    return Group(dispatch=dispatch, task=task, trajectories=trajectories, baseline_s=baseline_s)


def _make_columns(group: Group) -> list[_Columns]:
    """The arrays of each trajectory. Raises TypeError for those of another dtype or shape than their field is declared.

    A trajectory at a time: whole groups are megabytes, and no other thread runs while one call copies them.
    """
    columns, turns = [], 0
    opening: Tip[int] | None = None
    for trajectory in group.trajectories:
        tips: Tips[int] = Tips()
        if opening is not None:  # members of a group are asked the same: they begin alike
            tips.add(opening)
        completions = [turn.completion for turn in trajectory.turns]
        columns.append(_make_column(completions, tips, turns))
        if opening is None and completions:
            first = completions[0]
            opening = Tip(key=turns, prompt_ids=first.prompt_ids, sampled_ids=first.token_ids)
        turns += len(completions)
    return columns


def _make_column(completions: Sequence[Completion], tips: Tips[int], first: int) -> _Columns:
    """The arrays of one trajectory, whose first turn is the ``first``-th of the group."""
    places: list[tuple[int, int, int, int]] = []
    ids: list[_Array] = []
    for number, completion in enumerate(completions, start=first):
        prompt = _require(completion.prompt_ids, np.int32)
        sampled = _require(completion.token_ids, np.int32)
        source, shared = tips.add(Tip(key=number, prompt_ids=prompt, sampled_ids=sampled))
        places.append((-1 if source is None else source, shared, len(prompt) - shared, len(sampled)))
        ids += [prompt[shared:], sampled]
    versions, version_lengths = _pack_runs(_join([each.versions for each in completions], np.int32))
    oldest, oldest_lengths = _pack_runs(_join([each.oldest_versions for each in completions], np.int32))
    return _Columns(
        places=np.asarray(places, "<i4").tobytes(),
        ids=pack_ids(_join(ids, np.int32)),
        logprobs=_join([each.logprobs for each in completions], np.float32).tobytes(),
        versions=versions,
        version_lengths=version_lengths,
        oldest_versions=oldest,
        oldest_lengths=oldest_lengths,
    )


def _split(data: memoryview, sizes: Sequence[int]) -> list[_Columns]:
    ends = list(itertools.accumulate(sizes))
    if len(data) != sum(sizes):
        raise ValueError(f"{len(data)} bytes of columns, expected {sum(sizes)}")
    parts = [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [_Columns(*parts[start : start + 7]) for start in range(0, len(parts), 7)]


def _read_arrays(columns: Sequence[_Columns]) -> Iterator[_Array]:
    """The arrays of each turn in the order of the fields of ``Completion``."""
    places = _join([np.frombuffer(each.places, "<i4") for each in columns], np.int32).reshape(-1, 4)
    ids = _join([unpack_ids(each.ids) for each in columns], np.int32)
    logprobs = _freeze(_join([np.frombuffer(each.logprobs, "<f4") for each in columns], np.float32))
    versions = _freeze(_join([_unpack_runs(each.versions, each.version_lengths) for each in columns], np.int32))
    oldest = _freeze(_join([_unpack_runs(each.oldest_versions, each.oldest_lengths) for each in columns], np.int32))
    if not places[:, 3].sum() == len(logprobs) == len(versions) == len(oldest):
        raise ValueError(f"{places[:, 3].sum()} sampled ids, {len(logprobs)} log-probs, {len(versions)} versions")
    start = 0
    for sequence, count in zip(_lay_sequences(places, ids), places[:, 3].tolist(), strict=True):
        stop, drawn_from = start + count, len(sequence) - count
        yield sequence[:drawn_from]
        yield sequence[drawn_from:]
        yield logprobs[start:stop]
        yield versions[start:stop]
        yield oldest[start:stop]
        start = stop


def _lay_sequences(places: _Array, ids: _Array) -> list[_Array]:
    """The ids of each turn, sampled ones included. A turn that another one continues is a part of that one's array."""
    sources, shared = places[:, 0].tolist(), places[:, 1].tolist()
    own = (places[:, 2] + places[:, 3]).tolist()
    lengths = [a + b for a, b in zip(shared, own, strict=True)]
    holders = list(range(len(lengths)))
    for number in reversed(holders.copy()):
        source = sources[number]
        if source >= 0 and shared[number] == lengths[source] and holders[source] == source:
            holders[source] = holders[number]
    arrays = {holder: np.empty(lengths[holder], np.int32) for holder in set(holders)}
    sequences: list[_Array] = []
    start = 0
    for number, source in enumerate(sources):
        sequence = arrays[holders[number]][: lengths[number]]
        if source >= 0 and holders[source] != holders[number]:
            sequence[: shared[number]] = sequences[source][: shared[number]]
        sequence[shared[number] :] = ids[start : start + own[number]]
        sequences.append(sequence)
        start += own[number]
    if start != len(ids):
        raise ValueError(f"{len(ids)} token ids for turns of {start}")
    return [_freeze(sequence) for sequence in sequences]


def _pack_runs(values: _Array) -> tuple[bytes, bytes]:
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, len(values)), starts.dtype), starts])
    return pack_ids(values[starts]), pack_ids(np.diff(starts, append=len(values)))


def _unpack_runs(values: _Buffer, lengths: _Buffer) -> _Array:
    return np.repeat(unpack_ids(values), unpack_ids(lengths))


def _require(array: _Array, dtype: type[np.generic]) -> _Array:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        raise TypeError(
            f"an array of a completion is {np.asarray(array).dtype}{list(np.shape(array))}; "
            f"expected {np.dtype(dtype)} with one dimension"
        )
    return array


def _join(arrays: Sequence[_Array], dtype: type[np.generic]) -> _Array:
    return np.concatenate([np.zeros(0, dtype), *(_require(array, dtype) for array in arrays)])


def _freeze(array: _Array) -> _Array:
    array.flags.writeable = False
    return array


def _pack_trajectories(trajectories: tuple[Trajectory, ...]) -> bytes:
    """Trajectories in MessagePack, without their arrays. An agent's words can hold lone surrogates, which UTF-8 cannot:
    one odd answer must not end the run, so they become their escapes."""
    try:
        return msgspec.msgpack.encode(trajectories, enc_hook=_plain_or_column)
    except UnicodeEncodeError:
        words = [
            replace(trajectory, answer=_escape(trajectory.answer), error=_escape(trajectory.error))
            for trajectory in trajectories
        ]
        return msgspec.msgpack.encode(words, enc_hook=_plain_or_column)


def _escape(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _plain_or_column(value: object) -> Any:
    return None if isinstance(value, np.ndarray) else _plain(value)


def _plain(value: object) -> Any:
    """What MessagePack cannot say by itself: arrays, and the numpy scalars that arithmetic on them leaves behind."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        raw = np.ascontiguousarray(value).tobytes()
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode([value.dtype.str, value.shape, raw]))
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    raise TypeError(f"a value of type {type(value).__name__} has no stored form")


def _decode_trajectories(data: msgspec.Raw, arrays: Iterator[_Array]) -> tuple[Trajectory, ...]:
    """msgspec asks ``dec_hook`` for each field declared as an array, in the order in which they were encoded."""
    return msgspec.msgpack.decode(data, type=tuple[Trajectory, ...], dec_hook=lambda _type, _nil: next(arrays))


def _extension(code: int, data: memoryview) -> _Array:
    if code != _ARRAY:
        raise ValueError(f"unknown extension type {code}")
    dtype, shape, raw = _ARRAY_DECODER.decode(data)
    array = np.frombuffer(raw, dtype=np.dtype(dtype))
    if array.size != math.prod(shape):
        raise ValueError(f"an array of {array.size} values cannot have shape {shape}")
    return array.reshape(shape)


_ARRAY_DECODER = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bytes])
_HEAD_DECODER = msgspec.msgpack.Decoder(tuple[list[int], msgspec.Raw, msgspec.Raw])
_FIELDS_DECODER = msgspec.msgpack.Decoder(tuple[Dispatch, Task, float | None], ext_hook=_extension)
