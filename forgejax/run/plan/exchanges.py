"""What the chips of a compiled program exchange, read off its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+[0-9]+[a-z0-9]*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+)")
_BOUND = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] \{([^}]*)\})")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchanges:
    """By kind of collective, how often it runs and the bytes that a chip sends for it.

    Bytes are those of a ring: of a gather, a scatter or an all-to-all of n chips (n - 1)/n of the whole, of a sum twice
    that. A loop counts as often as it goes round where its condition compares with a constant, else once.
    """

    runs: Mapping[str, int]
    sent: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of all kinds."""
        return sum(self.sent.values())

    @staticmethod
    def join(parts: Mapping[str, Exchanges] | list[Exchanges]) -> Exchanges:
        """Of several programs, one after the other."""
        runs: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            runs.update(part.runs)
            sent.update(part.sent)
        return Exchanges(runs=dict(runs), sent=dict(sent))


def read_exchanges(text: str) -> Exchanges:
    """Of an optimised HLO module, as ``jax.stages.Compiled.as_text`` gives it."""
    bodies, entry = _split(text)
    partitions = _PARTITIONS.search(text.partition("\n")[0])
    everybody = int(partitions[1]) if partitions else 1
    found: dict[str, tuple[int, str, int]] = {}  # the compiler spreads one collective over several fusions
    for name, times in _count_calls(bodies, entry).items():
        for number, line in enumerate(bodies[name]):
            if each := _COLLECTIVE.search(line):
                chain = _CHAIN.search(line)
                key = chain[0] if chain else f"{name} {number}"
                size = _sent(each[2], each[1], _count_members(line, everybody))
                found[key] = max(found.get(key, (0, "", 0)), (times, each[2], size))
    runs: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for times, kind, size in found.values():
        runs[kind] += times
        sent[kind] += times * size
    return Exchanges(runs=dict(runs), sent=dict(sent))


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and which one is the entry."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (found := _COMPUTATION.match(line)):
            current = found[1]
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _count_calls(bodies: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            trips = _count_trips(bodies[found[1]]) if (found := _LOOP.search(line)) else 1
            for called in _called_in(line):
                if called in bodies:
                    callers[called].append((name, trips))
    counts = {entry: 1}

    def count(name: str) -> int:
        if name not in counts:
            counts[name] = sum(count(caller) * trips for caller, trips in callers[name])
        return counts[name]

    return {name: count(name) for name in bodies}


def _count_trips(condition: list[str]) -> int:
    """How often a loop from 0 goes round: up to the one constant that its condition compares with."""
    bounds = [int(found[1]) for line in condition if (found := _BOUND.search(line))]
    return bounds[0] if len(bounds) == 1 and any("direction=LT" in line for line in condition) else 1


def _called_in(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from (name.strip().removeprefix("%") for name in branches.split(","))


def _sent(kind: str, results: str, members: int) -> int:
    """What one chip sends, once. Of a start's results, operand and whole, the whole is the largest."""
    whole = max((_size(dtype, dims) for dtype, dims in _ARRAY.findall(results)), default=0)
    if kind == "collective-permute":
        return whole
    if kind == "reduce-scatter":
        whole *= members
    share = whole * (members - 1) // members
    return 2 * share if kind == "all-reduce" else share


def _count_members(line: str, everybody: int) -> int:
    """How many chips one group has; without groups there is one, of all."""
    found = _GROUPS.search(line)
    if found is None:
        return everybody
    size, listed, axes, named = found.groups()
    if size:
        return int(size)
    if listed is not None:
        return len(listed.split(","))
    sizes = dict(axis.split("=") for axis in axes.split(","))
    return math.prod(int(sizes[name]) for name in named.split(","))


def _size(dtype: str, dims: str) -> int:
    bits = re.search(r"\d+", dtype)  # f8e4m3fn has 8, pred one byte
    return max(1, int(bits[0]) // 8 if bits else 1) * math.prod(int(each) for each in dims.split(",") if each)
