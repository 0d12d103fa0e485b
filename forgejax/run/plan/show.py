"""A plan as text for people, and as plain data for programs."""

from __future__ import annotations

import json
from typing import Any

from forgejax.run.plan.dry_run import DryRun
from forgejax.run.plan.footprint import Footprint
from forgejax.run.plan.nearest import Choice, estimate_step, rows_of
from forgejax.run.plan.work import Work, count_decode

_GIB = 2**30
_WIDTH = 11
_TITLES = {
    "weights": "weights",
    "FP32 weights": "masters",
    "moments": "moments",
    "gradients": "gradients",
    "engine's weights": "engine",
    "weights that arrive": "arriving",
    "the program": "program",
}


def to_text(found: DryRun) -> str:
    """Several paragraphs."""
    parts = []
    if found.footprint is not None:
        parts += [_describe(found.footprint), _table(found.footprint), _pages(found.footprint)]
        parts += [_exchanges(found), _estimate(found)]
    parts.append(_verdict(found))
    return "\n\n".join(part for part in parts if part)


def to_json(found: DryRun) -> str:
    """One JSON object: bytes and seconds."""
    data: dict[str, Any] = {"fits": found.fits, "reason": found.reason}
    if (footprint := found.footprint) is not None:
        step, works = estimate_step(footprint.site)
        data |= {
            "mesh": footprint.site.plan.describe(),
            "hosts": footprint.site.hosts,
            "usable": footprint.usable,
            "phases": {phase.name: {**phase.parts, "compiled": phase.compiled} for phase in footprint.phases},
            "pool": footprint.residents.pool,
            "pages": footprint.residents.pages,
            "pages_left": footprint.pages_left,
            "tokens_left": footprint.tokens_left,
            "step_seconds": step,
            "seconds": {name: work.seconds(footprint.site.plan.chip) for name, work in works.items()},
        }
    data["exchanges"] = {
        name: {
            kind: {"runs": program.exchanges.runs[kind], "bytes": size} for kind, size in program.exchanges.sent.items()
        }
        for name, program in found.programs.items()
    }
    data["compiled_seconds"] = {name: round(program.seconds, 1) for name, program in found.programs.items()}
    if found.nearest is not None:
        data["nearest"] = list(found.nearest.options)
    return json.dumps(data, indent=2)


def show_choices(choices: list[Choice]) -> str:
    """A ranking, one line each."""
    lines = [f"{'chips':>6} {'GiB left':>9} {'s a step':>9} {'tokens/s':>10}  options"]
    for choice in choices:
        footprint, seconds = choice.footprint, choice.step_seconds
        left = "" if footprint.usable is None else f"{_left(footprint) / _GIB:.2f}"
        lines.append(
            f"{choice.plan.chips:>6} {left:>9} {_number(seconds):>9} {choice.tokens_per_second:>10,.0f}  "
            + " ".join(choice.options)
        )
    return "\n".join(lines)


def _describe(footprint: Footprint) -> str:
    site = footprint.site
    engines = "engines elsewhere"
    if site.engine is not None:
        engines = f"an engine on each host's {site.engine.mesh.size}" if site.hosts > 1 else "an engine beside it"  # type: ignore[union-attr]
    hosts = f"{site.hosts} hosts" if site.hosts > 1 else "one host"
    rows = rows_of(site)
    return (
        f"{site.plan.describe()}, {hosts}, {engines}\n"
        f"a micro-batch: {rows.rows} rows of {rows.length:,} tokens; requests of up to "
        f"{site.config.engine.max_context:,} tokens"
    )


def _table(footprint: Footprint) -> str:
    """GiB a chip: a row for each program, a column for what lies there."""
    names = list(dict.fromkeys(name for phase in footprint.phases for name in phase.parts))
    titles = [*(_TITLES[name] for name in names), "pages", "in all"]
    lines = ["GiB on each chip while a program runs (* counted, not compiled)", " " * 12 + "".join(map(_cell, titles))]
    for phase in footprint.phases:
        sizes = [phase.parts.get(name, 0) for name in names]
        cells = [*sizes, footprint.residents.pool, phase.bytes + footprint.residents.pool]
        mark = "" if phase.compiled else "*"
        lines.append(f"{phase.name + mark:<12}" + "".join(_cell(f"{size / _GIB:.2f}") for size in cells))
    if footprint.usable is not None:
        lines.append(f"{'there is':<12}{_cell('') * (len(titles) - 1)}{_cell(f'{footprint.usable / _GIB:.2f}')}")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return f"{text:>{_WIDTH}}"


def _pages(footprint: Footprint) -> str:
    engine, residents = footprint.site.config.engine, footprint.residents
    if footprint.site.engine is None:
        return ""
    tokens = (residents.pages - 1) * engine.page_tokens
    said = (
        f"keys and values of {tokens:,} tokens on each host, {residents.page * residents.pages / _GIB:.2f} GiB a chip"
    )
    if footprint.tokens_left is not None:
        said += f"; beside {footprint.worst.name} there is room for {footprint.tokens_left:,}"
    return said


def _exchanges(found: DryRun) -> str:
    if not found.programs:
        return ""
    lines = ["what a chip sends, GiB (how often)"]
    for name, program in found.programs.items():
        kinds = [
            f"{kind} {size / _GIB:.2f} ({program.exchanges.runs[kind]:,})"
            for kind, size in sorted(program.exchanges.sent.items(), key=lambda item: -item[1])
        ]
        lines.append(f"{name:<12}{', '.join(kinds) or 'nothing'}")
    return "\n".join(lines)


def _estimate(found: DryRun) -> str:
    footprint = found.footprint
    assert footprint is not None
    site = footprint.site
    step, works = estimate_step(site)
    if step is None:
        return ""
    works = {name: _measured(found, name, work) for name, work in works.items()}
    if site.engine is not None:
        engine = site.config.engine
        tokens = min(engine.max_context, (footprint.residents.pages - 1) * engine.page_tokens // engine.slots)
        works["decode step"] = count_decode(site.config.policy, site.engine, engine.slots, tokens)
    lines = ["at best, seconds = max(FLOPs / peak, bytes of memory / rate, bytes sent / rate) on each chip:"]
    for name, work in works.items():
        seconds = work.seconds(site.plan.chip)
        told = ", ".join(f"{bound} {each:.4g}" for bound, each in seconds.items())
        lines.append(f"{name:<12}{max(seconds.values()):.4g} s ({told})")
    rows = rows_of(site)
    total = sum(max(works[name].seconds(site.plan.chip).values()) for name in ("micro-batch", "update"))
    lines.append(f"{rows.tokens:,} packed tokens a micro-batch: {rows.tokens / total:,.0f} a second")
    return "\n".join(lines)


def _measured(found: DryRun, name: str, work: Work) -> Work:
    """With what the compiler says is sent, where it has said it."""
    program = found.programs.get({"micro-batch": "accumulate", "update": "apply"}[name])
    return work if program is None else Work(flops=work.flops, memory=work.memory, sent=program.exchanges.bytes)


def _verdict(found: DryRun) -> str:
    if found.fits:
        checked = "compiled for its chips" if found.programs else "shapes checked and bytes counted; nothing compiled"
        return f"it fits ({checked})"
    lines = [f"it does not fit: {found.reason}"]
    if found.nearest is None:
        lines.append("nothing near fits either: choose another chip, a shorter context, or a smaller policy")
    else:
        lines.append(f"the nearest that does, by count: {' '.join(found.nearest.options)}")
    return "\n".join(lines)


def _left(footprint: Footprint) -> int:
    assert footprint.usable is not None
    return footprint.usable - footprint.worst.bytes - footprint.residents.pool


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
