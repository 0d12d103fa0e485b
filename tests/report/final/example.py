"""A sound summary that tests change one field of."""

from typing import Any

from forgejax.report.final.summary import LevelChange, Summary


def summary(**changes: Any) -> Summary:
    """64 tasks solved 0.25 before and 0.75 after; 1,000 tokens and 20 groups accounted for; 4 of 80 episodes failed."""
    given: dict[str, Any] = {
        "eval_reward_before": 0.25,
        "eval_reward_after": 0.75,
        "eval_gain": 0.5,
        "eval_gain_low": 0.42,
        "eval_gain_high": 0.58,
        "eval_reward_before_se": 0.03,
        "eval_reward_after_se": 0.04,
        "levels": {
            "easy": LevelChange(
                outcome_before=0.4,
                outcome_before_se=0.05,
                outcome_after=0.9,
                outcome_after_se=0.05,
                tool_use_before=0.5,
                tool_use_after=0.05,
                episode_s_before=1.5,
                episode_s_after=0.5,
            ),
            "hard": LevelChange(
                outcome_before=0.1,
                outcome_before_se=0.05,
                outcome_after=0.6,
                outcome_after_se=0.05,
                tool_use_before=0.5,
                tool_use_after=0.95,
                episode_s_before=2.5,
                episode_s_after=3.5,
            ),
        },
        "eval_tasks": 64,
        "seed": 7,
        "steps": 20,
        "wall_s": 61.0,
        "skipped_steps": 0,
        "drift_tokens": 0,
        "logprob_gap_max": 3e-6,
        "logprob_gap_mean": 4e-7,
        "logprob_gap_tokens": 5000,
        "tree_token_ratio": 4.5,
        "prefix_cache_hit_rate": 0.8,
        "staleness_steps_max": 2,
        "window_disorder_max": 3,
        "tokens_sampled": 1000,
        "tokens_trained": 700,
        "tokens_not_trained": {"evaluation": 200, "zero_advantage": 100},
        "groups_dispatched": 20,
        "groups_trained": 16,
        "groups_not_trained": {"zero_advantage": 3, "in_flight_at_end": 1},
        "episodes": {"completed": 70, "truncated": 6, "agent_failed": 4},
        "episodes_masked": {"agent_failed": 4},
    }
    return Summary(**(given | changes))
