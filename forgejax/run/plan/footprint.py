"""Whether a run fits its chips: what lies on each while each of its programs runs, and what is left for pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from forgejax.run.plan.chips import usable_bytes
from forgejax.run.plan.needs import Need, count_needs
from forgejax.run.plan.residents import Residents, Site, count_residents

_FRAGMENTS = 0.15  # more than its live arrays the compiler lays out for a program: 5 and 14 % where it was read
_GIB = 2**30
_WITH_GRADIENTS = ("accumulate", "pull_back", "apply", "decode", "prefill")  # engines decode between two micro-batches
_OWN_WEIGHTS = "weights that arrive"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One program, and bytes of each chip while it runs: ``parts`` by what they are for, the pool's pages left out."""

    name: str
    parts: Mapping[str, int]
    compiled: bool

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of each chip.

    Attributes:
        site: the run on its mesh.
        residents: what lies there.
        phases: one for each program.
        usable: of a chip's memory; None where it is unknown.
    """

    site: Site
    residents: Residents
    phases: tuple[Phase, ...]
    usable: int | None

    @staticmethod
    def of(site: Site, compiled: Mapping[str, Need] | None = None) -> Footprint:
        """By what was compiled, else counted. Raises MeshError where weights do not divide by the mesh."""
        residents = count_residents(site)
        needs = [(compiled or {}).get(need.name, need) for need in count_needs(site, residents)]
        return Footprint(
            site=site,
            residents=residents,
            phases=tuple(_phase(need, residents) for need in needs),
            usable=usable_bytes(site.plan),
        )

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def pages_left(self) -> int | None:
        """How many pages have room in the worst phase, less than none where that alone does not fit; None without an
        engine here, or where the memory is unknown."""
        if self.usable is None or not self.residents.page:
            return None
        return (self.usable - self.worst.bytes) // self.residents.page - 1  # one belongs to nobody

    @property
    def tokens_left(self) -> int | None:
        """Keys and values of how many tokens these hold."""
        return None if self.pages_left is None else max(0, self.pages_left) * self.site.config.engine.page_tokens

    def refuse(self) -> str:
        """Why it does not fit; "" where it does, or where nothing is known of the memory."""
        if self.usable is None:
            return ""
        chip, worst = self.site.plan.chip.name, self.worst
        if worst.bytes > self.usable:
            largest = sorted(worst.parts.items(), key=lambda part: -part[1])[:3]
            told = ", ".join(f"{size / _GIB:.2f} GiB for {name}" for name, size in largest)
            return (
                f"{worst.name} needs {worst.bytes / _GIB:.2f} GiB on each chip before any page of keys and values, and "
                f"a {chip} has {self.usable / _GIB:.2f} GiB: {told}"
            )
        engine, left = self.site.config.engine, self.pages_left
        if left is None or left >= self.residents.pages - 1:
            return ""
        if left < engine.context_pages:
            return (
                f"{worst.name} leaves room for {self.tokens_left:,} tokens of keys and values on each host, and one "
                f"request of engine.max_context {engine.max_context:,} takes {engine.max_context:,}"
            )
        asked = (
            f"engine.kv_pages {engine.kv_pages}" if engine.kv_pages else f"engine.slots {engine.slots} and kept pages"
        )
        return f"{worst.name} leaves room for {left:,} pages, and {asked} take {self.residents.pages - 1:,}"


def _phase(need: Need, residents: Residents) -> Phase:
    parts = {
        "weights": residents.weights,
        "FP32 weights": residents.masters,
        "moments": residents.moments,
        "gradients": residents.gradients if need.name in _WITH_GRADIENTS else 0,
        "engine's weights": residents.engine,
        _OWN_WEIGHTS: residents.replica if need.name == "publish" else 0,
        "the program": int(need.bytes * (1 + _FRAGMENTS)),
    }
    return Phase(name=need.name, parts={name: size for name, size in parts.items() if size}, compiled=need.compiled)
