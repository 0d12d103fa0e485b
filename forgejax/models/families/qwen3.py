"""Qwen3, dense: an RMSNorm on each head's query and key."""

from forgejax.models.families.base import ATTENTION, EMBEDDINGS, HEAD_NORMS, MLP, Family

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    tensors=(*EMBEDDINGS, *ATTENTION, *HEAD_NORMS, *MLP),
    qk_norm="head",
    head_dim=128,
    supported={"attention_bias": (False,), "use_sliding_window": (False,), "attention_dropout": (0, None)},
)
