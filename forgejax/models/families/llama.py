"""Llama 2 and 3, SmolLM2, and whatever else says ``LlamaForCausalLM``."""

from forgejax.models.families.base import ATTENTION, EMBEDDINGS, MLP, Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf="llama",
    tensors=(*EMBEDDINGS, *ATTENTION, *MLP),
    supported={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0, None),
        "pretraining_tp": (1, None),
    },
    interleaved_gguf=True,
)
