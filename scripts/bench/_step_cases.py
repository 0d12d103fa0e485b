"""What the train step is measured on: policies, and samples of random tokens in the shapes that agents leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from forgejax.learner import Sample
from forgejax.models import PolicyConfig
from forgejax.models.rope import RopeConfig

Groups = list[list[Sample]]

# The frequencies of Qwen3, for Tunix has no others: what its configuration says of them is not read.
_QWEN3 = PolicyConfig(qk_norm="head", rope=RopeConfig(theta=1e6))
MODELS = {
    "tiny": _QWEN3,
    "20m": dataclasses.replace(
        _QWEN3, vocab_size=8192, num_layers=10, d_model=384, num_heads=6, num_kv_heads=3, head_dim=64, d_ff=1024
    ),
    "135m": PolicyConfig(
        vocab_size=49152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_ff=1536
    ),
}


class Draw:
    """Samples of random tokens; groups are lists of them."""

    def __init__(self, vocab_size: int) -> None:
        self.rng = np.random.default_rng(0)
        self.vocab_size = vocab_size

    def ids(self, count: int) -> np.ndarray:
        """Any token but 0, which peers pad with."""
        return self.rng.integers(1, self.vocab_size, count).astype(np.int32)

    def sample(self, context: np.ndarray, answer: np.ndarray) -> Sample:
        """A sample drawn by version 0, about as likely as the fresh policy finds it."""
        zeros = np.zeros(len(answer), np.int32)
        return Sample(
            request_id=f"r{self.rng.integers(2**62)}",
            context_ids=context.astype(np.int32),
            token_ids=answer,
            old_logp=self.rng.normal(-np.log(self.vocab_size), 0.1, len(answer)).astype(np.float32),
            versions=zeros,
            oldest_versions=zeros,
            advantage=float(self.rng.normal()),
        )

    def grpo(self, prompt: int, members: int, answer: int) -> Groups:
        context = self.ids(prompt)
        return [[self.sample(context, self.ids(answer)) for _ in range(members)]]

    def turns(self, members: int, turns: int, system: int, *, think: int, say: int, observe: int) -> Groups:
        """Agents whose thinking is stripped from the later context: with think = 0 each prompt extends the last."""
        shared, group = self.ids(system), []
        for _ in range(members):
            context = shared
            for _ in range(turns):
                said = self.ids(say)
                group.append(self.sample(context, np.concatenate([self.ids(think), said])))
                context = np.concatenate([context, said, self.ids(observe)])
        return [group]

    def ragged(self) -> Groups:
        groups: Groups = []
        for _ in range(4):
            context = self.ids(int(self.rng.integers(16, 256)))
            groups.append([self.sample(context, self.ids(int(self.rng.integers(4, 96)))) for _ in range(4)])
        return groups


CASES: dict[str, Callable[[Draw], Groups]] = {
    "grpo_p1024_g8_r32": lambda draw: draw.grpo(1024, 8, 32),
    "grpo_p256_g8_r32": lambda draw: draw.grpo(256, 8, 32),
    "multiturn_g8_t8": lambda draw: draw.turns(8, 8, 128, think=0, say=16, observe=16),
    "stripped_g4_t6": lambda draw: draw.turns(4, 6, 128, think=32, say=32, observe=32),
    "ragged": Draw.ragged,
    "chain": lambda draw: draw.grpo(768, 1, 256),
}
