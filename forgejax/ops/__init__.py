"""Attention and other kernels: one public function each, one file per backend, one oracle."""

from forgejax.ops.tree_attention import Kernel, kernel_for, tree_attention
from forgejax.ops.tree_meta import TreeMeta, tree_meta

__all__ = ["Kernel", "TreeMeta", "kernel_for", "tree_attention", "tree_meta"]
