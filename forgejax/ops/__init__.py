"""Attention and other kernels: one public function each, one file per backend, one oracle."""

from forgejax.ops.tree.attention import Kernel, kernel_for, tree_attention
from forgejax.ops.tree.meta import TreeMeta, tree_meta
from forgejax.ops.tree.split import SplitMeta, split_meta

__all__ = ["Kernel", "SplitMeta", "TreeMeta", "kernel_for", "split_meta", "tree_attention", "tree_meta"]
