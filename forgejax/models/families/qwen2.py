"""Qwen2 and Qwen2.5: biases on q, k and v."""

from forgejax.models.families.base import ATTENTION, ATTENTION_BIASES, EMBEDDINGS, MLP, Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    tensors=(*EMBEDDINGS, *ATTENTION, *ATTENTION_BIASES, *MLP),
    attention_bias=True,
    supported={"use_sliding_window": (False,), "attention_dropout": (0, None)},
)
