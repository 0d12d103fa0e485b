"""The nouns that flow between the packages, and the Protocols the packages meet at. Frozen, checked when made."""

from forgejax.types.endings import EpisodeEnds, Failure
from forgejax.types.episode import (
    Reward,
    Session,
    Sessions,
    SessionSpec,
    StopReason,
    Task,
    Trajectory,
    Turn,
)
from forgejax.types.pool import (
    Dispatch,
    Group,
    GroupSink,
    Judge,
    Verdict,
)
from forgejax.types.sampling import (
    Completion,
    FinishReason,
    Grammar,
    OnTokens,
    Purpose,
    Sampler,
    SampleRequest,
    SamplingLaw,
    TokenIds,
    WeightSink,
)

__all__ = [
    "Completion",
    "Dispatch",
    "EpisodeEnds",
    "Failure",
    "FinishReason",
    "Grammar",
    "Group",
    "GroupSink",
    "Judge",
    "OnTokens",
    "Purpose",
    "Reward",
    "SampleRequest",
    "Sampler",
    "SamplingLaw",
    "Session",
    "SessionSpec",
    "Sessions",
    "StopReason",
    "Task",
    "TokenIds",
    "Trajectory",
    "Turn",
    "Verdict",
    "WeightSink",
]
