"""The vanilla sampler of Tunix for ``rollout.py``, as its rollouts call it: runs in an environment of its own.

Each round is one batch, prompts padded on the left to the next multiple of 512; log-probabilities are returned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from sides.batches import Ids, answer_lines, read_workload, take_stdout
from sides.tunix_side import make_policy, read_case
from tunix.generate import sampler as tunix_sampler

_PADDED = 512
_NEVER = -1  # an id that no policy draws


class IdTokenizer:
    """Texts that are ids in decimal, for a sampler that takes nothing but texts; token 0 is padding."""

    def encode(self, text: str, **_options: Any) -> Ids:
        return [int(word) for word in text.split()]

    def decode(self, ids: Ids, **_options: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return _NEVER

    def pad_id(self) -> int:
        return 0


def main(folder: Path, replies: int) -> None:
    config, weights, _ = read_case(folder)
    policy = make_policy(config, weights)
    longest = read_workload(folder)["context"] + _PADDED
    cache = tunix_sampler.CacheConfig(
        cache_size=longest,
        num_layers=config["num_layers"],
        num_kv_heads=config["num_kv_heads"],
        head_dim=config["head_dim"],
    )
    sampler = tunix_sampler.Sampler(policy, IdTokenizer(), cache)

    def sample(prompts: list[Ids], drawn: int) -> Sequence[Ids]:
        width = -(-max(map(len, prompts)) // _PADDED) * _PADDED
        out = sampler(
            [" ".join(map(str, prompt)) for prompt in prompts],
            max_generation_steps=drawn,
            max_prompt_length=width,
            eos_tokens=[_NEVER],
            temperature=1.0,
            top_p=1.0,
            seed=0,
            return_logprobs=True,
        )
        return [[int(token) for token in tokens] for tokens in out.tokens]

    def score(ids: Ids) -> list[float]:
        row = jnp.asarray([ids])
        mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))[None]
        logits, _ = policy(row, jnp.arange(len(ids))[None], None, mask)
        logp = jax.nn.log_softmax(logits[0, :-1].astype(jnp.float32), axis=-1)
        found: list[float] = jnp.take_along_axis(logp, row[0, 1:, None], axis=1)[:, 0].tolist()
        return found

    answer_lines(folder, sample, score, replies)


if __name__ == "__main__":
    main(Path(sys.argv[1]), take_stdout())
