"""Group <-> bytes, lossless: every array comes back with its dtype, shape and bits.

Layout: 4 bytes of magic and format version, 4 bytes CRC-32 of the body (big endian), then the body in MessagePack.
Arrays are extension type 1, holding ``[dtype.str, shape, raw bytes in C order]``; decoded arrays are read-only.
"""

import math
import zlib
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from forgejax.errors import PoolError
from forgejax.types import Group

MAGIC = b"FJG\x01"
_ARRAY = 1
_HEADER = len(MAGIC) + 4


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
        body = _packed(group)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise PoolError(
            f"group {group.dispatch.index} (task {group.task.id}) cannot be stored: {error}; "
            "put only plain data and numeric arrays into a group and its task payload"
        ) from error
    return MAGIC + zlib.crc32(body).to_bytes(4, "big") + body


def decode_group(data: bytes, *, index: int) -> Group:
    """The group that ``encode_group`` wrote. ``index`` names it in errors. Raises PoolError on damaged bytes."""
    advice = "restore the journal from a backup, or start a new run directory"
    if data[: len(MAGIC)] != MAGIC:
        raise PoolError(
            f"group {index}: its stored bytes start with {data[:4]!r}, expected {MAGIC!r} (format 1); "
            f"they are damaged or written by another version; {advice}"
        )
    body = data[_HEADER:]
    if zlib.crc32(body) != int.from_bytes(data[len(MAGIC) : _HEADER], "big"):
        raise PoolError(f"group {index}: its {len(data)} stored bytes do not match their checksum; {advice}")
    try:
        group = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise PoolError(f"group {index}: its stored bytes are not a group: {error}; {advice}") from error
    if group.dispatch.index != index:
        raise PoolError(f"group {index}: its stored bytes are those of group {group.dispatch.index}; {advice}")
    return group


def _packed(group: Group) -> bytes:
    """The group in MessagePack. An agent's words can hold lone surrogates, which UTF-8 cannot: one odd answer must not
    end the run, so they become their escapes."""
    try:
        return msgspec.msgpack.encode(group, enc_hook=_plain)
    except UnicodeEncodeError:
        words = (
            replace(trajectory, answer=_escaped(trajectory.answer), error=_escaped(trajectory.error))
            for trajectory in group.trajectories
        )
        return msgspec.msgpack.encode(replace(group, trajectories=tuple(words)), enc_hook=_plain)


def _escaped(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _plain(value: object) -> Any:
    """What MessagePack cannot say by itself: arrays, and the numpy scalars that arithmetic on them leaves behind."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        raw = np.ascontiguousarray(value).tobytes()
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode([value.dtype.str, value.shape, raw]))
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    raise TypeError(f"a value of type {type(value).__name__} has no stored form")


def _extension(code: int, data: memoryview) -> np.ndarray[Any, np.dtype[Any]]:
    if code != _ARRAY:
        raise ValueError(f"unknown extension type {code}")
    dtype, shape, raw = _ARRAY_DECODER.decode(data)
    array = np.frombuffer(raw, dtype=np.dtype(dtype))
    if array.size != math.prod(shape):
        raise ValueError(f"an array of {array.size} values cannot have shape {shape}")
    return array.reshape(shape)


def _array_as_declared(expected: type, value: object) -> object:
    """msgspec asks here about the fields declared as arrays; it checks the type of what is returned itself."""
    return value


_ARRAY_DECODER = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bytes])
_DECODER = msgspec.msgpack.Decoder(Group, dec_hook=_array_as_declared, ext_hook=_extension)
