"""What a layer keeps for the backward pass, and what it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from forgejax.sharding import constrain

Kept = Literal["all", "products", "attention", "nothing", "share"]
"""What a layer keeps for the backward pass; the rest it computes again.

``products``: what its matrix products and its attention gave, so that only norms, rotations and activations are
computed again. ``attention``: the same without the MLP's, whose two inner products are made twice. ``nothing``: its
input alone, which every layer keeps in any case. ``share``: of its input the tokens that are the device's share among
those that split the heads; they gather it from one another, once a layer more in the forward pass and twice in the
backward pass.
"""

Layer = Callable[[tuple[jax.Array, Any], Any], tuple[tuple[jax.Array, Any], Any]]
"""One step of the scan over layers; its carry begins with x [B, T, D]."""


_NAMES: dict[Kept, tuple[str, ...]] = {
    "products": ("qkv", "attended", "stream", "gated"),
    "attention": ("qkv", "attended", "stream"),
    "nothing": (),
    "share": (),
}


def remembering(layer: Layer, keep: Kept) -> Layer:
    """The layer, of which the backward pass keeps what ``keep`` says; its numbers are the same."""
    if keep == "all":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*_NAMES[keep])
    whole = layer if keep != "share" else _with_input(layer, "length")
    # Inside a scan the compiler cannot merge the recomputation with the forward pass: no barrier is needed.
    body: Layer = jax.checkpoint(whole, prevent_cse=False, policy=policy)
    return body if keep != "share" else _with_input(body, "kept")


def _with_input(layer: Layer, tokens: str) -> Layer:
    """The layer, its input's tokens first split as that logical axis says; what it gives is split as rows are."""

    def run(carry: tuple[jax.Array, Any], xs: Any) -> tuple[tuple[jax.Array, Any], Any]:
        (x_BTD, carried), left = layer((_laid_out(carry[0], tokens), carry[1]), xs)
        return (constrain(x_BTD, "rows", "length", None), carried), left

    return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _laid_out(x_BTD: jax.Array, tokens: str) -> jax.Array:
    """x, its tokens split as a logical axis says, its gradient as rows are.

    Were the gradient split as x is, the partitioner would split a layer's tokens for the gradients of weights as well,
    and each device would work on all of a weight's width.
    """
    return constrain(x_BTD, "rows", tokens, None)


def _laid_out_forward(x_BTD: jax.Array, tokens: str) -> tuple[jax.Array, None]:
    return constrain(x_BTD, "rows", tokens, None), None


def _laid_out_backward(tokens: str, _: None, d_BTD: jax.Array) -> tuple[jax.Array]:
    return (constrain(d_BTD, "rows", "length", None),)


_laid_out.defvjp(_laid_out_forward, _laid_out_backward)
