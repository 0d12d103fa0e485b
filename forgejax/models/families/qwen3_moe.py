"""Qwen3-MoE: Qwen3 with a softmax router over experts in every layer."""

from forgejax.models.families.base import ATTENTION, EMBEDDINGS, HEAD_NORMS, ExpertSettings, Family, Tensor

_LAYER = "model.layers.{layer}.mlp"

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    gguf="qwen3moe",
    tensors=(
        *EMBEDDINGS,
        *ATTENTION,
        *HEAD_NORMS,
        Tensor(ours="blocks.router", name=f"{_LAYER}.gate.weight", form="X D -> D X"),
        Tensor(ours="blocks.expert_gate", name=_LAYER + ".experts.{expert}.gate_proj.weight", form="F D -> D F"),
        Tensor(ours="blocks.expert_up", name=_LAYER + ".experts.{expert}.up_proj.weight", form="F D -> D F"),
        Tensor(ours="blocks.expert_down", name=_LAYER + ".experts.{expert}.down_proj.weight", form="D F -> F D"),
    ),
    qk_norm="head",
    experts=ExpertSettings(
        count="num_experts",
        aliases=("num_local_experts",),
        d_ff="moe_intermediate_size",
        router="softmax",
        normalize="norm_topk_prob",
    ),
    supported={
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "attention_dropout": (0, None),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
)
