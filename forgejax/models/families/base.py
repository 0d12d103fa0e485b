"""What a family of open-weight models is: names in config.json, names of tensors, and what it cannot say, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from forgejax.errors import ConfigError
from forgejax.models.families.rope import read_rope, write_rope
from forgejax.models.moe import MoEConfig
from forgejax.models.policy import PolicyConfig

Settings = Mapping[str, Any]
"""A config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """How one weight of ours is stored.

    ``name`` is the stored tensor's name; its ``{layer}`` and ``{expert}`` are the leading dimensions of our weight.
    ``form`` says how the rest lies: ``"(H C) D -> D H C"`` is a stored matrix [H*C, D] and our [..., D, H, C].
    """

    ours: str
    name: str
    form: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """The names of a mixture of experts in config.json.

    ``aliases`` are other names of ``count``. Without a ``d_ff`` the experts' width is intermediate_size. ``normalize``
    says whether the chosen experts' scores are divided by their sum; without such a key they are.
    """

    count: str
    aliases: tuple[str, ...] = ()
    d_ff: str = ""
    router: Literal["softmax", "sigmoid"]
    correction_bias: bool = False
    normalize: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``. ``attention_bias`` and ``qk_norm`` are fixed by the family.

    ``supported`` names keys of config.json that would change the computation, with the values under which this decoder
    is exact; an absent key counts as supported. ``gguf`` is the architecture's name in GGUF files.
    """

    model_type: str
    architecture: str
    gguf: str
    tensors: tuple[Tensor, ...]
    attention_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    head_dim: int = 0  # of a config.json that does not say; 0: hidden_size / num_attention_heads
    rope_theta: float = 10_000.0  # of a config.json that does not say
    partial_rope: bool = False
    experts: ExpertSettings | None = None
    supported: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    interleaved_gguf: bool = False  # whether GGUF files hold q and k permuted for interleaved rotary pairs

    def read(self, settings: Settings, base: PolicyConfig) -> PolicyConfig:
        """``base`` with the architecture of a config.json. Raises ConfigError."""
        self._check_supported(settings)
        d_model, num_heads = _count(settings, "hidden_size"), _count(settings, "num_attention_heads")
        head_dim = settings.get("head_dim") or self.head_dim or d_model // num_heads
        return dataclasses.replace(
            base,
            vocab_size=_count(settings, "vocab_size"),
            num_layers=_count(settings, "num_hidden_layers"),
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=settings.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            d_ff=_count(settings, "intermediate_size"),
            norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(settings.get("tie_word_embeddings", False)),
            attention_bias=self.attention_bias,
            qk_norm=self.qk_norm,
            rope=read_rope(settings, head_dim, self.rope_theta, self.partial_rope),
            moe=self._read_experts(settings),
        )

    def write(self, config: PolicyConfig) -> dict[str, Any]:
        """The keys of config.json that say what ``read`` reads."""
        settings: dict[str, Any] = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.d_model,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_size,
            "intermediate_size": config.d_ff,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied_embeddings,
            **write_rope(config.rope, config.head_size, self.partial_rope),
        }
        if (experts := self.experts) is not None:
            width = config.moe.d_ff or config.d_ff
            settings |= {
                experts.count: config.moe.num_experts,
                "num_experts_per_tok": config.moe.experts_per_token,
                experts.d_ff or "intermediate_size": width,
            }
            if experts.normalize:
                settings[experts.normalize] = config.moe.normalize
        return settings

    def holds(self, config: PolicyConfig) -> bool:
        """Whether a config.json of this family can say all of ``config``."""
        try:
            return _plain(self.read(self.write(config), config)) == _plain(config)
        except ConfigError:
            return False

    def _check_supported(self, settings: Settings) -> None:
        wrong = []
        if settings.get("quantization_config") is not None:
            method = settings["quantization_config"].get("quant_method", "unknown")
            wrong.append(f"quantization_config is of {method!r}; supported: none (bf16, fp16 or fp32 tensors)")
        if settings.get("hidden_act", "silu") != "silu":
            wrong.append(f"hidden_act is {settings['hidden_act']!r}; supported: 'silu'")
        if any(kind != "full_attention" for kind in settings.get("layer_types") or ()):
            kinds = sorted(set(settings["layer_types"]))
            wrong.append(f"layer_types are {kinds}; supported: full_attention in every layer")
        for key, values in self.supported.items():
            if key in settings and settings[key] not in values:
                names = " or ".join(repr(value) for value in values)
                wrong.append(f"{key} is {settings[key]!r}; supported: {names}")
        if wrong:
            raise ConfigError("; ".join(f"its {each}" for each in wrong))

    def _read_experts(self, settings: Settings) -> MoEConfig:
        if (experts := self.experts) is None:
            return MoEConfig()
        count = next((key for key in (experts.count, *experts.aliases) if key in settings), experts.count)
        return MoEConfig(
            num_experts=_count(settings, count),
            experts_per_token=_count(settings, "num_experts_per_tok"),
            d_ff=_count(settings, experts.d_ff) if experts.d_ff else 0,
            router=experts.router,
            correction_bias=experts.correction_bias,
            normalize=bool(settings.get(experts.normalize, False)) if experts.normalize else True,
        )


def _count(settings: Settings, key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        given = f"is {value!r}" if key in settings else "is missing"
        raise ConfigError(f"its {key} {given}; expected a positive count")
    return value


def _plain(config: PolicyConfig) -> PolicyConfig:
    """``config`` with what 0 stands for spelled out, and unused settings at their defaults."""
    moe = config.moe
    width = moe.d_ff or config.d_ff
    rotary_dim = config.rope.rotary_dim or config.head_size
    return dataclasses.replace(
        config,
        head_dim=config.head_size,
        d_ff=width if moe.num_experts else config.d_ff,
        rope=dataclasses.replace(config.rope, rotary_dim=rotary_dim),
        moe=dataclasses.replace(moe, d_ff=width) if moe.num_experts else MoEConfig(),
    )


EMBEDDINGS = (
    Tensor(ours="embedding", name="model.embed_tokens.weight", form="V D -> V D"),
    Tensor(ours="final_norm", name="model.norm.weight", form="D -> D"),
    Tensor(ours="head", name="lm_head.weight", form="V D -> D V"),
)
ATTENTION = (
    Tensor(ours="blocks.attention_norm", name="model.layers.{layer}.input_layernorm.weight", form="D -> D"),
    Tensor(ours="blocks.q", name="model.layers.{layer}.self_attn.q_proj.weight", form="(H C) D -> D H C"),
    Tensor(ours="blocks.k", name="model.layers.{layer}.self_attn.k_proj.weight", form="(K C) D -> D K C"),
    Tensor(ours="blocks.v", name="model.layers.{layer}.self_attn.v_proj.weight", form="(K C) D -> D K C"),
    Tensor(ours="blocks.o", name="model.layers.{layer}.self_attn.o_proj.weight", form="D (H C) -> H C D"),
    Tensor(ours="blocks.mlp_norm", name="model.layers.{layer}.post_attention_layernorm.weight", form="D -> D"),
)
ATTENTION_BIASES = (
    Tensor(ours="blocks.q_bias", name="model.layers.{layer}.self_attn.q_proj.bias", form="(H C) -> H C"),
    Tensor(ours="blocks.k_bias", name="model.layers.{layer}.self_attn.k_proj.bias", form="(K C) -> K C"),
    Tensor(ours="blocks.v_bias", name="model.layers.{layer}.self_attn.v_proj.bias", form="(K C) -> K C"),
)
HEAD_NORMS = (
    Tensor(ours="blocks.q_norm", name="model.layers.{layer}.self_attn.q_norm.weight", form="C -> C"),
    Tensor(ours="blocks.k_norm", name="model.layers.{layer}.self_attn.k_norm.weight", form="C -> C"),
)
FULL_NORMS = (
    Tensor(ours="blocks.q_norm", name="model.layers.{layer}.self_attn.q_norm.weight", form="(H C) -> H C"),
    Tensor(ours="blocks.k_norm", name="model.layers.{layer}.self_attn.k_norm.weight", form="(K C) -> K C"),
)
MLP = (
    Tensor(ours="blocks.gate", name="model.layers.{layer}.mlp.gate_proj.weight", form="F D -> D F"),
    Tensor(ours="blocks.up", name="model.layers.{layer}.mlp.up_proj.weight", form="F D -> D F"),
    Tensor(ours="blocks.down", name="model.layers.{layer}.mlp.down_proj.weight", form="D F -> F D"),
)
