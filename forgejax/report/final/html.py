"""The report of a run as one HTML file that needs nothing else: no network, no script, no second file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from forgejax.report.final.courses import Course
from forgejax.report.final.endings import make_endings
from forgejax.report.final.headlines import (
    TOLD_IN_WORDS,
    describe_repeatability,
    describe_time,
    make_headlines,
)
from forgejax.report.final.history import AttemptSpan
from forgejax.report.final.invariants import NO_BOUND, Bounds, check_invariants
from forgejax.report.final.summary import Summary
from forgejax.report.names import format_duration
from forgejax.report.storage import write_atomic
from forgejax.types import Failure

REPORT_FILE = "report.html"
_TRANSCRIPT_CHARS = 20_000
_LABELS = {"compiles": "Programs compiled", "batch_shapes": "Shapes of packed batches"}


class Example(TypedDict):
    """One evaluation episode as a reader sees it. All text is untrusted: it is escaped."""

    question: str
    answer: str | None
    tool_calls: int
    reward: float
    transcript: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows. ``curve_png`` is None when nothing could be drawn; ``config`` is the resolved TOML.

    ``ended_before`` and ``ended_after`` are the episodes of the two evaluations by stop reason; ``failures`` a few of
    those that failed. ``history`` has a line of words for each resume. ``date`` is when the report was made,
    ``machine`` what the run was on, by names of its own.
    """

    title: str
    summary: Summary
    bounds: Bounds
    curve_png: bytes | None = None
    courses: Sequence[Course] = ()
    ended_before: Mapping[str, int] = field(default_factory=dict)
    ended_after: Mapping[str, int] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    attempts: Sequence[AttemptSpan] = ()
    history: Sequence[str] = ()
    examples_before: Sequence[Example] = ()
    examples_after: Sequence[Example] = ()
    config: str = ""
    command_line: str = ""
    date: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One entry of an account: its name, its count and its share of the whole."""

    name: str
    count: int
    share: float


def make_slices(trained: int, not_trained: Mapping[str, int], *, unaccounted: int) -> tuple[Slice, ...]:
    """The account of tokens or groups, trained first, then the reasons by size, then what nothing accounts for."""
    entries = [("trained", trained), *sorted(not_trained.items(), key=lambda entry: (-entry[1], entry[0]))]
    if unaccounted:
        entries.append(("unaccounted", unaccounted))
    whole = sum(max(0, count) for _, count in entries) or 1
    return tuple(Slice(name=name, count=count, share=max(0, count) / whole) for name, count in entries)


def render_html(report: Report) -> str:
    """The page. Every text in it is escaped, and its content policy forbids any script or outside resource."""
    # Imported here: only the end of a run needs it.
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("forgejax.report.final", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summary = report.summary
    found = check_invariants(summary, report.bounds)
    return environment.get_template(REPORT_FILE).render(
        report=report,
        summary=summary,
        headlines=make_headlines(summary),
        checks=found,
        broken=sum(check.holds is False for check in found),
        no_bound=NO_BOUND,
        untold=", ".join(check.name for check in found if check.holds is None and check.bound != NO_BOUND),
        tokens=make_slices(summary.tokens_trained, summary.tokens_not_trained, unaccounted=summary.account_open_tokens),
        groups=make_slices(summary.groups_trained, summary.groups_not_trained, unaccounted=summary.groups_open),
        endings=make_endings(report.ended_before, summary.episodes, report.ended_after),
        time=describe_time(summary),
        figures=_figures(summary),
        examples=(
            ("Before training", [_cut(example) for example in report.examples_before]),
            ("After training", [_cut(example) for example in report.examples_after]),
        ),
        curve=_encode(report.curve_png) if report.curve_png else None,
        courses=[(course, _encode(course.png)) for course in report.courses],
    )


def write_html(run_dir: Path, report: Report) -> Path:
    """Writes ``run_dir/report.html``, whole or not at all; gives its path. Raises StorageFullError or ConfigError."""
    path = run_dir / REPORT_FILE
    # An agent's text can hold lone surrogates, which no file can.
    write_atomic(path, render_html(report).encode("utf-8", "replace"))
    return path


def _encode(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _figures(summary: Summary) -> list[tuple[str, str]]:
    known = [
        ("Training steps", f"{summary.steps:,}"),
        ("Steps skipped (not finite)", f"{summary.skipped_steps:,}"),
        ("Wall clock", format_duration(summary.wall_s)),
        ("Evaluation tasks", f"{summary.eval_tasks:,}"),
        ("Seed", str(summary.seed)),
        ("Deterministic", describe_repeatability(summary)),
        ("Digest of the last weights", summary.params_digest or "not taken"),
        ("Unmerged tokens per tree token", _optional(summary.tree_token_ratio, ".2f")),
        ("Prefix-cache hit rate", _optional(summary.prefix_cache_hit_rate, ".1%")),
        ("Mean log-prob gap", _optional(summary.logprob_gap_mean, ".2e")),
    ]
    known += [
        (
            f"Log-prob gap, depth {depth.replace('_', ' ')} tokens",
            f"mean {gap.mean:.1e}, p99 {gap.p99:.1e}, max {gap.largest:.1e} over {gap.tokens:,} tokens, "
            f"ESS {gap.ess:.2%}",
        )
        for depth, gap in summary.logprob_gaps.items()
    ]
    others = {name: value for name, value in sorted(summary.figures.items()) if name not in TOLD_IN_WORDS}
    return known + [(_LABELS.get(name, name), _optional(value, ",.6g")) for name, value in others.items()]


def _optional(value: float | None, spec: str) -> str:
    return "not measured" if value is None else format(value, spec)


def _cut(example: Example) -> Example:
    transcript = example["transcript"]
    left_out = len(transcript) - _TRANSCRIPT_CHARS
    if left_out <= 0:
        return example
    return {**example, "transcript": f"{transcript[:_TRANSCRIPT_CHARS]}\n[{left_out:,} more characters]"}
