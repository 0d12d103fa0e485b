"""What the families are compared on, in numpy alone: weights, tokens and samples that anyone can draw again.

A tensor is a function of its Hugging Face name and its shape, so that recorded numbers need no weights beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from forgejax.learner import Sample

VOCABULARY = 24
Tensors = Mapping[str, NDArray[np.float32]]


def generator(name: str) -> np.random.Generator:
    """Numbers that depend on the name alone: seeded by the first 8 bytes (big endian) of its SHA-256."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def draw(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """The tensor of a Hugging Face name: normal numbers n, in which no norm is one and no bias zero.

    Norm scales are 1 + n/4, biases and embeddings n/2 (the router's correction n/8), and matrices [out, in] 1.5 n over
    the root of in: enough for attention, experts and logits to differ from token to token.
    """
    normal = generator(name).standard_normal(tuple(shape))
    if name.endswith("norm.weight"):
        drawn = 1.0 + normal / 4
    elif name.endswith("e_score_correction_bias"):
        drawn = normal / 8
    elif name.endswith(("bias", "embed_tokens.weight")):
        drawn = normal / 2
    else:
        drawn = 1.5 * normal * shape[-1] ** -0.5
    return drawn.astype(np.float32)


def write_folder(out: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Path:
    """A Hugging Face folder of drawn weights."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: draw(name, shape) for name, shape in shapes.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def tokens() -> NDArray[np.int32]:
    """The 16 ids whose logits are compared; of these and of ``groups`` none lies near a tie between experts."""
    return generator("tokens-8-8").integers(0, VOCABULARY, 16).astype(np.int32)


def groups() -> list[list[Sample]]:
    """Two groups: episodes of several turns that share prefixes and branch, and equal samples that disagree.

    In the first, three members answer one prompt in up to three turns; the last turn of one leaves out a part of its
    context and so is a branch of its own. In the second, at temperature 0.7, one sequence comes twice with opposite
    advantages, and once cut short. Every fifth behaviour log-prob is so low that its ratio is clipped.
    """
    rng = generator("samples-8-8")

    def ids(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, VOCABULARY, count)]

    def sample(context: list[int], sampled: list[int], advantage: float, temperature: float = 1.0) -> Sample:
        old = rng.uniform(-4.5, -1.5, len(sampled))
        old[rng.permutation(len(sampled))[: -(-len(sampled) // 5)]] = -14.0
        none = np.zeros(len(sampled), np.int32)
        return Sample(
            request_id=f"sample-{len(context)}-{sampled}-{advantage}",
            context_ids=np.array(context, np.int32),
            token_ids=np.array(sampled, np.int32),
            old_logp=old.astype(np.float32),
            versions=none,
            oldest_versions=none,
            advantage=advantage,
            temperature=temperature,
        )

    prompt, episodes = ids(7), []
    for advantage in (0.75, -0.5, 1.25):
        first, tool, second = ids(4), ids(3), ids(5)
        episodes.append(sample(prompt, first, advantage))
        episodes.append(sample([*prompt, *first, *tool], second, advantage))
        if advantage > 1:
            episodes.append(sample([*prompt, *tool, *second, *ids(2)], ids(4), advantage - 0.5))
    question, answer = ids(5), ids(6)
    twins = [sample(question, answer, advantage, 0.7) for advantage in (1.5, -0.5)]
    return [episodes, [*twins, sample(question, answer[:3], 0.25, 0.7)]]
