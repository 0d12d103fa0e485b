"""The one door to JetStream: its engine contract, its protocol messages and its driver module, without TensorFlow.

``jetstream.engine.token_utils`` imports ``seqio`` for two tokenizer classes that this package never uses, and seqio
pulls in TensorFlow. Both classes are stood in for while JetStream is imported; the stand-ins are gone afterwards.
Importing JetStream's orchestrator also reconfigures the root logger, which is put back.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class _NoVocabulary:
    """Stands in for the vocabularies of seqio; this package works on token ids alone."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise RuntimeError("JetStream's tokenizers are not available here: send token ids")


@contextmanager
def _without_seqio() -> Iterator[None]:
    if "seqio" in sys.modules:
        yield
        return
    package, vocabularies = types.ModuleType("seqio"), types.ModuleType("seqio.vocabularies")
    for name in ("Vocabulary", "SentencePieceVocabulary"):
        setattr(vocabularies, name, type(name, (_NoVocabulary,), {}))
    package.vocabularies = vocabularies  # type: ignore[attr-defined]
    stubs = {"seqio": package, "seqio.vocabularies": vocabularies}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


with _without_seqio(), _root_logger_kept():
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc
    from jetstream.engine import engine_api, tokenizer_api, tokenizer_pb2


def _delete_pytree(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.delete()


# JetStream 0.2.2 calls jax.tree_map, which JAX has removed.
orchestrator.delete_pytree = _delete_pytree

__all__ = ["engine_api", "jetstream_pb2", "jetstream_pb2_grpc", "orchestrator", "tokenizer_api", "tokenizer_pb2"]
