"""MiniMax-M2: QK-norm over all heads at once, rotary on a part of each head, a sigmoid router with correction bias."""

from forgejax.models.families.base import ATTENTION, EMBEDDINGS, FULL_NORMS, ExpertSettings, Family, Tensor

_LAYER = "model.layers.{layer}.block_sparse_moe"

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    gguf="minimax-m2",
    tensors=(
        *EMBEDDINGS,
        *ATTENTION,
        *FULL_NORMS,
        Tensor(ours="blocks.router", name=f"{_LAYER}.gate.weight", form="X D -> D X"),
        Tensor(ours="blocks.router_bias", name=f"{_LAYER}.e_score_correction_bias", form="X -> X"),
        Tensor(ours="blocks.expert_gate", name=_LAYER + ".experts.{expert}.w1.weight", form="F D -> D F"),
        Tensor(ours="blocks.expert_up", name=_LAYER + ".experts.{expert}.w3.weight", form="F D -> D F"),
        Tensor(ours="blocks.expert_down", name=_LAYER + ".experts.{expert}.w2.weight", form="D F -> F D"),
    ),
    qk_norm="full",
    head_dim=128,
    rope_theta=5_000_000.0,
    partial_rope=True,
    experts=ExpertSettings(count="num_local_experts", aliases=("num_experts",), router="sigmoid", correction_bias=True),
    supported={
        "attention_dropout": (0, None),
        "router_jitter_noise": (0, None),
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
    },
)
