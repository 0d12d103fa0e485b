"""The end of a run: summary.json, the reward curve and the one-file report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import jax

from forgejax.report.evaluation import NOT_MEASURED
from forgejax.report.final.courses import draw_courses
from forgejax.report.final.history import format_date, list_attempts
from forgejax.report.final.html import Report, write_html
from forgejax.report.final.invariants import Bounds
from forgejax.report.final.plots import draw_curve
from forgejax.report.final.summary import GapOfDepth, Summary, make_evaluation_fields, write_summary
from forgejax.report.sinks.jsonl import read_metrics
from forgejax.report.storage import write_atomic
from forgejax.run.config import TrainConfig, to_mapping
from forgejax.run.loop import Outcome
from forgejax.run.rundir import RunDir, read_history

CURVE_FILE = "curve.png"
_PACKAGES = (
    "forgejax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "google-jetstream",
    "aiohttp",
    "openai",
    "reasoning-gym",
)


def conclude(outcome: Outcome, config: TrainConfig, place: RunDir, command_line: str) -> tuple[Summary, Path]:
    """Writes the run's results and gives the summary and the path of the report."""
    summary = summarise(outcome, config)
    write_summary(place.path, summary)
    rows = read_metrics(place.path)
    curve = draw_curve(rows)
    if curve is not None:
        write_atomic(place.path / CURVE_FILE, curve)
    report = Report(
        title=place.name,
        summary=summary,
        bounds=window_bounds(config),
        curve_png=curve,
        courses=draw_courses(rows),
        ended_before=outcome.before.result.ended if outcome.before else {},
        ended_after=outcome.after.result.ended if outcome.after else {},
        failures=outcome.failures,
        attempts=list_attempts(rows),
        examples_before=outcome.before.examples if outcome.before else (),
        examples_after=outcome.after.examples if outcome.after else (),
        config=json.dumps(to_mapping(config), indent=2),
        command_line=command_line,
        history=[
            f"Attempt {number}: {attempt.describe()}" for number, attempt in enumerate(read_history(place.path), 1)
        ][1:],
        date=format_date(time.time()),
        machine=describe_machine(),
        versions=find_versions(),
    )
    return summary, write_html(place.path, report)


def describe_machine() -> dict[str, str]:
    """What this process runs on, as far as the system tells."""
    devices = Counter(device.device_kind for device in jax.devices())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _read_processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{pages / 2**30:.1f} GiB",
        "devices": ", ".join(f"{count} × {name}" for name, count in devices.items()),
    }


def find_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run does, as far as they are installed."""
    installed = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **installed}


def _read_processor() -> str:
    """The processor's name; where Linux does not tell it, its architecture."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def window_bounds(config: TrainConfig) -> Bounds:
    """What the window promises for this configuration."""
    window = config.pool.window
    return Bounds(disorder=window.max_disorder, staleness_steps=window.max_staleness)


def summarise(outcome: Outcome, config: TrainConfig) -> Summary:
    sums, account = outcome.sums, outcome.account
    before, after = (each.result if each else NOT_MEASURED for each in (outcome.before, outcome.after))
    return Summary(
        **make_evaluation_fields(before, after),
        eval_tasks=outcome.eval_tasks,
        seed=config.run.seed,
        deterministic=config.run.deterministic,
        params_digest=outcome.params_digest,
        steps=outcome.steps,
        wall_s=sums.wall_s,
        skipped_steps=sums.skipped_steps,
        drift_tokens=sums.drift_tokens,
        unaudited_tokens=sums.unaudited_tokens,
        logprob_gap_max=sums.gap_max,
        logprob_gap_mean=sums.gap_mean,
        logprob_gap_tokens=sums.gap_tokens,
        logprob_gaps={
            name: GapOfDepth(tokens=band.tokens, mean=band.mean, p99=band.p99, largest=band.largest, ess=band.ess)
            for name, band in sums.gaps.items()
        },
        tree_token_ratio=sums.tree_token_ratio,
        prefix_cache_hit_rate=outcome.cache_hit_rate,
        staleness_steps_max=outcome.staleness_max,
        window_disorder_max=outcome.disorder_max,
        tokens_sampled=account.tokens_sampled,
        tokens_trained=account.tokens_trained,
        tokens_not_trained=dict(account.tokens_not_trained),
        groups_dispatched=account.groups_dispatched,
        groups_trained=account.groups_trained,
        groups_not_trained=dict(account.groups_not_trained),
        episodes=sums.episodes,
        episodes_masked=sums.masked_episodes,
        figures={
            "compiles": outcome.compiles,
            "batch_shapes": outcome.batch_shapes,
            "step_s": sums.train_s,
            "wait_share": sums.wait_s / sums.train_s if sums.train_s else None,
            "packing_wait_share": sums.packing_wait_s / sums.train_s if sums.train_s else None,
        },
    )
