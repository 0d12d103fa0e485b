"""Servers of tokens elsewhere, as samplers: ours, SGLang's and vLLM's. Nothing here imports jax."""
