"""Where a compiled program spends its time: a trace of one run, its operations named by the scope they come from."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

_INSTRUCTION = re.compile(r'%([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')
_PARTS = ("attention", "projections", "mlp", "vocabulary")


def profile(run: Callable[[], Any], compiled: str) -> dict[str, float]:
    """Shares of the busy time of XLA's threads in one call of ``run``, by part of the model; the rest is ``other``.

    Args:
        run: calls a program that has compiled already.
        compiled: the HLO text of the one that counts.
    """
    scopes = dict(_INSTRUCTION.findall(compiled))
    spent: dict[str, float] = defaultdict(float)
    for name, duration in _operations(run):
        spent[_part(scopes.get(name, ""))] += duration
    total = sum(spent.values())
    return {f"share_{part}": spent[part] / total for part in (*_PARTS, "other") if part in spent}


def _part(scope: str) -> str:
    """The innermost part that the scope names: ``jit(f)/transpose(jvp(mlp))/dot_general`` is mlp's."""
    found = [(scope.rfind(part), part) for part in _PARTS if part in scope]
    return max(found)[1] if found else "other"


def _operations(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Every operation that XLA ran, and its nanoseconds; loops are counted by what runs inside them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        return [
            (event.name, event.duration_ns)
            for plane in data.planes
            for line in plane.lines
            if "XLA" in line.name
            for event in line.events
            if not event.name.startswith(("ThunkExecutor", "while", "call", "conditional"))
        ]
