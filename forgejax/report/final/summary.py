"""The figures a run ends with, as ``summary.json``."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from forgejax.errors import ConfigError
from forgejax.report.evaluation import EvaluationResult
from forgejax.report.final.account import close_account
from forgejax.report.final.bootstrap import paired_gain
from forgejax.report.storage import storage_errors, write_atomic

SUMMARY_FILE = "summary.json"
_OPEN = "account_open_tokens"

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Amount = Annotated[float, msgspec.Meta(ge=0.0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run in figures. Outcomes and shares are in [0, 1], ``_s`` are seconds, ``_se`` standard errors.

    A figure that was not measured, or is not finite, is None; array scalars become plain numbers. ``*_not_trained``
    count by reason. ``eval_gain`` is the paired difference of the outcomes with its 95 % interval. ``figures`` takes
    whatever else a run wants to keep. Each annotation is checked: ValueError.
    """

    eval_reward_before: Share | None
    eval_reward_after: Share | None
    eval_reward_before_se: Amount | None
    eval_reward_after_se: Amount | None
    eval_gain: float | None
    eval_gain_low: float | None
    eval_gain_high: float | None
    eval_reward_before_easy: Share | None
    eval_reward_before_hard: Share | None
    eval_reward_after_easy: Share | None
    eval_reward_after_hard: Share | None
    eval_reward_before_easy_se: Amount | None
    eval_reward_before_hard_se: Amount | None
    eval_reward_after_easy_se: Amount | None
    eval_reward_after_hard_se: Amount | None
    tool_use_before_easy: Share | None
    tool_use_before_hard: Share | None
    tool_use_after_easy: Share | None
    tool_use_after_hard: Share | None
    episode_s_before_easy: Amount | None
    episode_s_before_hard: Amount | None
    episode_s_after_easy: Amount | None
    episode_s_after_hard: Amount | None
    eval_tasks: Count
    seed: int
    steps: Count
    wall_s: Amount
    skipped_steps: Count
    drift_tokens: Count
    logprob_gap_max: Amount | None
    logprob_gap_mean: Amount | None
    logprob_gap_tokens: Count
    tree_token_ratio: Amount | None
    prefix_cache_hit_rate: Share | None
    staleness_steps_max: Count | None
    window_disorder_max: Count | None
    tokens_sampled: Count
    tokens_trained: Count
    tokens_not_trained: dict[str, Count]
    groups_dispatched: Count
    groups_trained: Count
    groups_not_trained: dict[str, Count]
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


def evaluation_fields(when: Literal["before", "after"], result: EvaluationResult) -> dict[str, Any]:
    """The fields of Summary that one evaluation fills; those of a level it did not have are None."""
    found: dict[str, float | None] = {
        f"eval_reward_{when}": result.overall.reward,
        f"eval_reward_{when}_se": result.overall.reward_se,
    }
    for level in ("easy", "hard"):
        figures = result.levels.get(level)
        found |= {
            f"eval_reward_{when}_{level}": figures.reward if figures else None,
            f"eval_reward_{when}_{level}_se": figures.reward_se if figures else None,
            f"tool_use_{when}_{level}": figures.tool_use if figures else None,
            f"episode_s_{when}_{level}": figures.episode_s if figures else None,
        }
    return found


def gain_fields(before: EvaluationResult, after: EvaluationResult) -> dict[str, Any]:
    """The fields of Summary that two evaluations fill together."""
    gain = paired_gain(before.tasks, after.tasks)
    return {
        "eval_gain": gain.mean if gain else None,
        "eval_gain_low": gain.low if gain else None,
        "eval_gain_high": gain.high if gain else None,
    }


def level_outcomes(before: EvaluationResult, after: EvaluationResult) -> dict[str, float | None]:
    """The outcomes of every level, for ``figures``."""
    return {
        f"outcome_{when}/{level}": figures.reward
        for when, result in (("before", before), ("after", after))
        for level, figures in result.levels.items()
    }


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Writes ``run_dir/summary.json``, whole or not at all; gives its path. Raises StorageFullError or ConfigError."""
    path = run_dir / SUMMARY_FILE
    record = {**asdict(summary), _OPEN: summary.account_open_tokens}
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


def _plain(value: Any) -> Any:
    """``value`` without array scalars, and with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number
