"""One Flax policy, the same code for training and for sampling."""

from forgejax.models.init import Params, abstract_policy, count_params, init_params
from forgejax.models.policy import Attend, Policy, PolicyConfig

__all__ = ["Attend", "Params", "Policy", "PolicyConfig", "abstract_policy", "count_params", "init_params"]
