"""What must hold in a sound run, each with the figure measured and the bound it is held to."""

from dataclasses import dataclass

from forgejax.errors import ConfigError
from forgejax.report.evaluation import find_failed_share
from forgejax.report.final.account import describe_account
from forgejax.report.final.summary import Summary

NO_BOUND = "none claimed"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The bounds of a run. None: no bound is claimed (the greedy window).

    For a window W, N groups in flight, P groups a step and a publication delay of d versions the disorder is at most
    W - 1 and the staleness at most floor((N + W - 2) / P) + d. ``gap_tokens`` is how many tokens the log-prob gap must
    have been measured on for it to count; ``failed_share`` what part of the training episodes must not have failed.
    """

    disorder: int | None
    staleness_steps: int | None
    logprob_gap: float = 1e-4
    gap_tokens: int = 1000
    failed_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("disorder", "staleness_steps", "logprob_gap", "gap_tokens", "failed_share"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"bound {name} is {value}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One invariant. ``holds`` is None where no bound is claimed, or too little was measured to tell."""

    name: str
    measured: str
    bound: str
    holds: bool | None
    meaning: str


def check_invariants(summary: Summary, bounds: Bounds) -> tuple[Check, ...]:
    """The invariants of a run, in the order of the report."""
    return (
        Check(
            name="Token drift",
            measured=f"{summary.drift_tokens:,} tokens{_describe_unaudited(summary)}",
            bound="0",
            holds=summary.drift_tokens == 0,
            meaning="The ids trained on are the ids the sampler saw and drew, position by position.",
        ),
        Check(
            name="Token account",
            measured=f"{summary.account_open_tokens:,} tokens open",
            bound="0",
            holds=summary.account_open_tokens == 0,
            meaning=describe_account(
                sampled=summary.tokens_sampled, trained=summary.tokens_trained, not_trained=summary.tokens_not_trained
            ),
        ),
        Check(
            name="Group account",
            measured=f"{summary.groups_open:,} groups open",
            bound="0",
            holds=summary.groups_open == 0,
            meaning="Each group that was started was trained or is counted under the reason it was not.",
        ),
        _gap(summary, bounds),
        _bounded(
            "Window disorder", summary.window_disorder_max, bounds.disorder, "groups", "How far a group overtook."
        ),
        _bounded(
            "Staleness",
            summary.staleness_steps_max,
            bounds.staleness_steps,
            "steps",
            "How many updates old the policy was on which a trained group began.",
        ),
        _failures(summary, bounds),
    )


def _describe_unaudited(summary: Summary) -> str:
    count = summary.unaudited_tokens
    return f"; {count:,} of {summary.tokens_trained:,} could not be compared" if count else ""


def _failures(summary: Summary, bounds: Bounds) -> Check:
    share, ended = find_failed_share(summary.episodes), sum(summary.episodes.values())
    return Check(
        name="Failed episodes",
        measured="no episode ended" if share is None else f"{share:.1%} of {ended:,}",
        bound=f"< {bounds.failed_share:.0%}",
        holds=None if share is None else share < bounds.failed_share,
        meaning="Training episodes that the agent, what it works in, or their deadline ended, and not the policy.",
    )


def _gap(summary: Summary, bounds: Bounds) -> Check:
    gap, tokens = summary.logprob_gap_max, summary.logprob_gap_tokens
    enough = tokens > bounds.gap_tokens
    meaning = "The largest difference between the log-probability the sampler recorded and the trainer's own."
    holds = gap is None or gap <= bounds.logprob_gap
    return Check(
        name="Log-prob gap",
        measured=f"{'none' if gap is None else f'{gap:.2e}'} over {tokens:,} tokens",
        bound=f"≤ {bounds.logprob_gap:.0e} over more than {bounds.gap_tokens:,} tokens",
        holds=None if holds and (gap is None or not enough) else holds,
        meaning=meaning if enough else f"{meaning} It was measured on too few tokens to say anything.",
    )


def _bounded(name: str, value: int | None, bound: int | None, unit: str, meaning: str) -> Check:
    return Check(
        name=name,
        measured="not measured" if value is None else f"{value:,} {unit}",
        bound=NO_BOUND if bound is None else f"≤ {bound:,}",
        holds=None if bound is None else value is not None and value <= bound,
        meaning=meaning,
    )
