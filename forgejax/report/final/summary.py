"""The figures a run ends with, as ``summary.json``."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec

from forgejax.errors import ConfigError
from forgejax.report.evaluation import NOT_MEASURED, EvaluationResult, LevelResult
from forgejax.report.final.account import close_account
from forgejax.report.final.bootstrap import measure_gain
from forgejax.report.storage import storage_errors, write_atomic

SUMMARY_FILE = "summary.json"
_OPEN = "account_open_tokens"

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Amount = Annotated[float, msgspec.Meta(ge=0.0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class LevelChange:
    """What the evaluations before and after training say of one level of tasks; None where one was not measured."""

    outcome_before: Share | None = None
    outcome_before_se: Amount | None = None
    outcome_after: Share | None = None
    outcome_after_se: Amount | None = None
    tool_use_before: Share | None = None
    tool_use_after: Share | None = None
    episode_s_before: Amount | None = None
    episode_s_after: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class GapOfDepth:
    """|trainer - sampler| of log-probabilities at one band of depths, and the effective sample size of the ratios as a
    share of the tokens."""

    tokens: Count
    mean: Amount
    p99: Amount
    largest: Amount
    ess: Share


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run in figures. Outcomes and shares are in [0, 1], ``_s`` are seconds, ``_se`` standard errors.

    A figure that was not measured, or is not finite, is None here and absent from the file; array scalars become plain
    numbers. ``*_not_trained`` count by reason; ``episodes`` are those of training that have ended, by stop reason, and
    ``episodes_masked`` those that train nothing, by the reason for it. ``eval_gain`` is the paired difference of the
    outcomes with its 95 % interval. ``unaudited_tokens`` were trained, and the engine's record that their ids were to
    be compared with is damaged. ``logprob_gaps`` is by depth of context. ``levels`` are those of the tasks where there
    are several, tool use is there where a tool was called. ``params_digest`` is a checksum of the last weights: of two
    runs that are ``deterministic``, of one configuration, on one machine, it is the same. ``figures`` takes whatever
    else a run wants to keep. Each annotation is checked: ValueError.
    """

    eval_reward_before: Share | None = None
    eval_reward_after: Share | None = None
    eval_reward_before_se: Amount | None = None
    eval_reward_after_se: Amount | None = None
    eval_gain: float | None = None
    eval_gain_low: float | None = None
    eval_gain_high: float | None = None
    tool_use_before: Share | None = None
    tool_use_after: Share | None = None
    episode_s_before: Amount | None = None
    episode_s_after: Amount | None = None
    levels: dict[str, LevelChange] = field(default_factory=dict)
    eval_tasks: Count
    seed: int
    deterministic: bool = False
    params_digest: str = ""
    steps: Count
    wall_s: Amount
    skipped_steps: Count
    drift_tokens: Count
    unaudited_tokens: Count = 0
    logprob_gap_max: Amount | None = None
    logprob_gap_mean: Amount | None = None
    logprob_gap_tokens: Count
    logprob_gaps: dict[str, GapOfDepth] = field(default_factory=dict)
    tree_token_ratio: Amount | None = None
    prefix_cache_hit_rate: Share | None = None
    staleness_steps_max: Count | None = None
    window_disorder_max: Count | None = None
    tokens_sampled: Count
    tokens_trained: Count
    tokens_not_trained: dict[str, Count]
    groups_dispatched: Count
    groups_trained: Count
    groups_not_trained: dict[str, Count]
    episodes: dict[str, Count] = field(default_factory=dict)
    episodes_masked: dict[str, Count] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, law in _field_laws().items():
            value = _plain(getattr(self, name))
            try:
                object.__setattr__(self, name, msgspec.convert(value, law))
            except msgspec.ValidationError as error:
                raise ValueError(f"summary: {name} is {value!r}: {error}") from error

    @property
    def account_open_tokens(self) -> int:
        """Sampled tokens that were neither trained nor counted under a reason; a sound run has 0."""
        return close_account(
            sampled=self.tokens_sampled, trained=self.tokens_trained, not_trained=self.tokens_not_trained
        )

    @property
    def groups_open(self) -> int:
        """Dispatched groups that were neither trained nor counted under a reason; a sound run has 0."""
        return self.groups_dispatched - self.groups_trained - sum(self.groups_not_trained.values())


def make_evaluation_fields(before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    """The fields of Summary that the evaluations before and after training fill."""
    gain = measure_gain(before.tasks, after.tasks)
    tools = any(result.overall.tool_use for result in (before, after))
    whole = _change(before.overall, after.overall, tools=tools)
    nothing = NOT_MEASURED.overall
    levels = {
        level: _change(before.levels.get(level, nothing), after.levels.get(level, nothing), tools=tools)
        for level in {**before.levels, **after.levels}
    }
    return {
        "eval_reward_before": whole.outcome_before,
        "eval_reward_after": whole.outcome_after,
        "eval_reward_before_se": whole.outcome_before_se,
        "eval_reward_after_se": whole.outcome_after_se,
        "eval_gain": gain.mean if gain else None,
        "eval_gain_low": gain.low if gain else None,
        "eval_gain_high": gain.high if gain else None,
        "tool_use_before": whole.tool_use_before,
        "tool_use_after": whole.tool_use_after,
        "episode_s_before": whole.episode_s_before,
        "episode_s_after": whole.episode_s_after,
        "levels": levels if len(levels) > 1 else {},
    }


def _change(before: LevelResult, after: LevelResult, *, tools: bool) -> LevelChange:
    return LevelChange(
        outcome_before=before.reward,
        outcome_before_se=before.reward_se,
        outcome_after=after.reward,
        outcome_after_se=after.reward_se,
        tool_use_before=before.tool_use if tools else None,
        tool_use_after=after.tool_use if tools else None,
        episode_s_before=before.episode_s,
        episode_s_after=after.episode_s,
    )


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Writes ``run_dir/summary.json``, whole or not at all; gives its path. Raises StorageFullError or ConfigError."""
    path = run_dir / SUMMARY_FILE
    record = _measured({**asdict(summary), _OPEN: summary.account_open_tokens})
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
    return path


def read_summary(run_dir: Path) -> Summary:
    """The summary of a run, checked: types, ranges, no unknown or missing field, and that its account is its own.

    Raises ConfigError naming what is wrong.
    """
    path = run_dir / SUMMARY_FILE
    with storage_errors(path):
        content = path.read_bytes()
    try:
        record = msgspec.json.decode(content, type=dict[str, Any])
        open_tokens = record.pop(_OPEN, None)
        unknown = sorted(record.keys() - {known.name for known in fields(Summary)})
        summary = msgspec.convert(record, Summary)
    except (msgspec.DecodeError, ValueError) as error:  # msgspec's validation errors are DecodeErrors
        raise ConfigError(
            f"{path} is not a summary of a run ({error}); it is damaged or of another version. "
            "Let the run write it anew."
        ) from error
    if unknown:
        raise ConfigError(f"{path} has unknown fields {unknown}; it is of another version. Let the run write it anew.")
    if open_tokens != summary.account_open_tokens:
        raise ConfigError(
            f"{path}: {_OPEN} is {open_tokens} but its other figures give {summary.account_open_tokens}; the file was "
            f"changed by hand. Let the run write it anew."
        )
    return summary


@functools.cache
def _field_laws() -> dict[str, Any]:
    return get_type_hints(Summary, include_extras=True)


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what is None, at any depth."""
    return {
        name: _measured(value) if isinstance(value, Mapping) else value
        for name, value in record.items()
        if value is not None
    }


def _plain(value: Any) -> Any:
    """``value`` as plain data: without array scalars, and with None for numbers that are not finite."""
    if isinstance(value, LevelChange):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number
