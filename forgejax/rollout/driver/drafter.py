"""What may come next in a request, looked up in what came before: prompt lookup, an n-gram's last continuation."""

from __future__ import annotations

from forgejax.rollout.driver.job import Job
from forgejax.rollout.engine.config import EngineConfig

_TRIED_TOKENS = 64  # drafted tokens after which a request whose drafts seldom hold good is no longer looked up
_LEAST_SHARE = 0.1  # of them that must have


class Drafter:
    """Follows one request, from its first draft on."""

    def __init__(self, job: Job, config: EngineConfig):
        self._job, self._ngram, self._most = job, config.draft_ngram, config.draft_tokens
        self._ids: list[int] = job.prompt_ids.tolist()
        self._read = 0  # runs of the job's draws
        self._after: dict[tuple[int, ...], int] = {}  # where the last continuation of an n-gram begins
        self._known = 0  # n-grams that are in it
        self.drafted = self.accepted = 0

    @property
    def share(self) -> float:
        """Of drafted tokens that hold good, as far as can be told."""
        return (self.accepted + 1) / (self.drafted + 2)

    def draft(self) -> list[int]:
        """The tokens that followed the last n-gram when it came before; none where it never did, where drafts of this
        request seldom hold good, or where it may draw one token more alone."""
        job = self._job
        if self.drafted >= _TRIED_TOKENS and self.accepted < _LEAST_SHARE * self.drafted:
            return []
        for draw in job.draws[self._read :]:
            self._ids += draw.token_ids.tolist()
        self._read = len(job.draws)
        self._learn()
        begin, draft = self._after.get(tuple(self._ids[-self._ngram :])), list[int]()
        if begin is not None:
            behind = len(self._ids) - begin  # where as many follow as are wanted; else they repeat
            for at in range(min(self._most, job.budget - job.drawn - 1)):
                draft.append(self._ids[begin + at] if at < behind else draft[at - behind])
        return draft

    def count(self, drafted: int, accepted: int) -> None:
        """Enters what became of a draft."""
        self.drafted += drafted
        self.accepted += accepted

    def _learn(self) -> None:
        """Enters the n-grams that something follows by now."""
        n, first = self._ngram, self._known
        last = max(len(self._ids) - n, first)
        columns = (self._ids[first + shift : last + shift] for shift in range(n))
        self._after.update(zip(zip(*columns, strict=True), range(first + n, last + n), strict=True))
        self._known = last
