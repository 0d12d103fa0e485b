"""What a run knows of its inference side, wherever that runs: one engine in this process, or many elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from forgejax.types import Completion, OnTokens, SampleRequest, TokenIds


@dataclass(frozen=True, kw_only=True)
class DrawnRequest:
    """The engine's own record of one request: the ids it was prompted with and those it drew.

    ``cut``: it was cancelled, so that whoever asked may have been given the first of ``sampled_ids`` alone.
    """

    prompt_ids: TokenIds
    sampled_ids: TokenIds
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineAccount:
    """Counts since the engines started; of several engines they add up.

    ``sampled`` counts each token when it is drawn; of these ``cancelled`` and ``failed`` were drawn for requests that
    nobody was given a completion of, ``lost`` for those that went with an engine that died, and ``open`` for requests
    that have not ended. ``inherited``, and of these ``inherited_cancelled`` and ``inherited_failed``, are the tokens
    that the engines' own records have of earlier attempts at the run. ``computed_tokens`` are prompts' tokens that were
    prefilled, those of preempted requests again; the last one of a prompt is fed to decoding. ``active`` and
    ``waiting`` are requests now.
    """

    sampled: int = 0
    cancelled: int = 0
    failed: int = 0
    lost: int = 0
    open: int = 0
    inherited: int = 0
    inherited_cancelled: int = 0
    inherited_failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    active: int = 0
    waiting: int = 0

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens whose keys and values were not computed again."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def __add__(self, other: EngineAccount) -> EngineAccount:
        names = [field.name for field in dataclasses.fields(self)]
        return EngineAccount(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Engines(Protocol):
    """The inference side of a run: a ``types.Sampler``, a ``types.WeightSink`` and the books of what was drawn.

    Use as a context manager: inside, requests are served. ``sample`` is awaited on an event loop, everything else may
    be called from any thread.
    """

    def __enter__(self) -> Engines: ...

    def __exit__(self, *_: object) -> None:
        """Ends the engines; open requests get an EngineError. Raises EngineError for one that hangs."""
        ...

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``."""
        ...

    def publish(self, params: Any, version: int) -> None:
        """Copies new weights to every engine; each token drawn by a later decode step is theirs.

        When this returns the caller may donate its buffers. Raises EngineError for weights of another model.
        """
        ...

    def account(self) -> EngineAccount:
        """The counts as they are now. It is also asked before the engines are entered, for ``inherited``."""
        ...

    def given_before(self) -> Mapping[str, int]:
        """Tokens of the completions that earlier attempts at the run were given, by owner, as their records have them.

        Records that were trimmed or are damaged count with no owner.
        """
        ...

    def requests_of(self, request_ids: Iterable[str]) -> Mapping[str, DrawnRequest]:
        """What the engines themselves recorded of these requests; those they know nothing of are left out."""
        ...

    @property
    def damaged_requests(self) -> int:
        """How many of the engines' own records were found damaged; ``requests_of`` leaves these out."""
        ...

    def trim(self, version: int) -> None:
        """Records of requests that ended under older versions are not asked for any more."""
        ...

    def flush(self) -> None:
        """Returns once the record of every request that has ended is on the disk. Raises EngineError."""
        ...

    def figures(self) -> Mapping[str, float]:
        """What else there is to be known of the engines now, as metrics of a step."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether requests are served, or will be again without anybody's help."""
        ...

    @property
    def trouble(self) -> str:
        """Why they are not healthy, for people; "" where they are."""
        ...
