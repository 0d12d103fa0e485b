"""What a rollout is measured on: sessions of turns in the shapes that agents and groups have, and their ideal cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from forgejax.types import Completion, TokenIds


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What stands behind the session's earlier tokens, and how many are drawn then."""

    observed: TokenIds
    drawn: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sessions that run at once, each turn by turn; new weights after ``publish_every`` turns of all (0: never)."""

    sessions: tuple[tuple[Turn, ...], ...]
    publish_every: int = 0

    @property
    def drawn(self) -> int:
        return sum(turn.drawn for turn in itertools.chain.from_iterable(self.sessions))

    @property
    def context(self) -> int:
        """Tokens of the longest session in the end."""
        return max(sum(len(turn.observed) + turn.drawn for turn in session) for session in self.sessions)

    def rounds(self) -> list[list[int]]:
        """The sessions that have a first turn, a second one, ...: what a sampler of batches draws at once."""
        longest = max(map(len, self.sessions))
        return [[n for n, session in enumerate(self.sessions) if len(session) > turn] for turn in range(longest)]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it was served: the version published last when it came, and its completion."""

    version: int
    completion: Completion


def count_ideal(served: Iterable[Asked]) -> int:
    """Prompt tokens that a prefill has to compute: each distinct one, with all before it, once per version.

    Left out are those that decoding has computed: the last of a prompt, which is fed to draw the first token, and what
    one version drew behind it, but for the last, which is fed to nobody.
    """
    wanted: set[tuple[int, int]] = set()
    decoded: set[tuple[int, int]] = set()
    for each in served:
        done = each.completion
        prefixes = list(_name_prefixes(np.concatenate([done.prompt_ids, done.token_ids])))
        prompt = len(done.prompt_ids) - 1
        wanted.update((each.version, name) for name in prefixes[:prompt])
        if set(done.versions) | set(done.oldest_versions) == {each.version}:
            decoded.update((each.version, name) for name in prefixes[prompt:-1])
    return len(wanted - decoded)


def _name_prefixes(ids: TokenIds) -> Iterable[int]:
    """A name for each prefix of ``ids``, the shortest first."""
    name = 0
    for token in ids.tolist():
        name = hash((name, token))
        yield name


def _draw(seed: int, vocab_size: int) -> Callable[[int], TokenIds]:
    """Gives so many random ids, never 0, which peers pad with."""
    rng = np.random.default_rng(seed)
    return lambda count: rng.integers(1, vocab_size, count).astype(np.int32)


def make_group(vocab_size: int) -> Workload:
    """One prompt of 2,048 tokens, 16 answers of 64."""
    turn = Turn(observed=_draw(0, vocab_size)(2048), drawn=64)
    return Workload(sessions=((turn,),) * 16)


def make_agent(vocab_size: int, publish_every: int = 0) -> Workload:
    """8 episodes of 10 turns behind a system prompt of 4,096 tokens: 60 are observed and 40 drawn a turn."""
    ids = _draw(0, vocab_size)
    system = ids(4096)

    def session() -> Sequence[Turn]:
        first = Turn(observed=np.concatenate([system, ids(60)]), drawn=40)
        return [first, *(Turn(observed=ids(60), drawn=40) for _ in range(9))]

    return Workload(sessions=tuple(tuple(session()) for _ in range(8)), publish_every=publish_every)


def make_ragged(vocab_size: int) -> Workload:
    """32 requests, prompts of 40 to 400 tokens and answers of 16 to 160, in geometric steps and random order."""
    ids, order = _draw(0, vocab_size), np.random.default_rng(1)
    prompts = order.permutation(np.geomspace(40, 400, 32).astype(int))
    answers = order.permutation(np.geomspace(16, 160, 32).astype(int))
    return Workload(
        sessions=tuple(
            (Turn(observed=ids(int(prompt)), drawn=int(answer)),)
            for prompt, answer in zip(prompts, answers, strict=True)
        )
    )


def make_unique(vocab_size: int) -> Workload:
    """16 prompts of 512 tokens that share nothing, an answer of 64 each."""
    ids = _draw(0, vocab_size)
    return Workload(sessions=tuple((Turn(observed=ids(512), drawn=64),) for _ in range(16)))


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "group": make_group,
    "agent": make_agent,
    "ragged": make_ragged,
    "unique": make_unique,
    "republish": lambda vocab_size: make_agent(vocab_size, publish_every=20),
}
