"""What is checked before a run costs anything: each refusal says what to set."""

from __future__ import annotations

import jax.numpy as jnp

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError
from forgejax.learner import lay_empty
from forgejax.ops import Kernel, kernel_for
from forgejax.run.config import TrainConfig
from forgejax.sharding import build_mesh, prepare_platform, resolve

ENGINE_DEVICES = 1
"""Devices beside the learner's mesh."""


def check_mesh(config: TrainConfig) -> None:
    """Raises MeshError for a mesh this machine cannot give, and ConfigError for rows or heads that the attention kernel
    of its devices cannot work with: at once, before anything is created for the run."""
    plan = resolve(config.mesh)
    prepare_platform(plan, extra_devices=ENGINE_DEVICES)
    check_kernel(kernel_for(build_mesh(plan)), config)


def check_kernel(kernel: Kernel, config: TrainConfig) -> None:
    """Raises ConfigError, with what to set, where the learner could not attend with this kernel."""
    rows_of_a_device = lay_empty(config.packing).batches[0].attention
    try:
        kernel.check(rows_of_a_device, jnp.dtype(config.policy.compute_dtype), config.policy.head_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_chat(config: TrainConfig) -> ChatFormat:
    """The tokenizer and chat template of a run. Raises ConfigError where the policy has fewer tokens than they."""
    chat = ChatFormat.load(config.tokenizer_folder)
    if chat.vocab_size > config.policy.vocab_size:
        raise ConfigError(
            f"the tokenizer in {config.tokenizer_folder} has {chat.vocab_size} tokens and policy.vocab_size is "
            f"{config.policy.vocab_size}; raise it to at least that"
        )
    return chat
