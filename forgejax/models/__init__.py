"""One Flax policy, the same code for training and for sampling, and the open-weight families it can be."""

from forgejax.models.init import Params, abstract_policy, count_params, init_params
from forgejax.models.keeping import Kept
from forgejax.models.moe import MoEConfig
from forgejax.models.policy import Attend, PerLayer, Policy, PolicyConfig
from forgejax.models.rope import RopeConfig
from forgejax.models.weights.export import export_policy
from forgejax.models.weights.folder import read_policy_config
from forgejax.models.weights.load import check_weights, load_params

__all__ = [
    "Attend",
    "Kept",
    "MoEConfig",
    "Params",
    "PerLayer",
    "Policy",
    "PolicyConfig",
    "RopeConfig",
    "abstract_policy",
    "check_weights",
    "count_params",
    "export_policy",
    "init_params",
    "load_params",
    "read_policy_config",
]
