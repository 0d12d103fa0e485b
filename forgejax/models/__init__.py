"""One Flax policy, the same code for training and for sampling."""

from forgejax.models.policy import Attend, Policy, PolicyConfig

__all__ = ["Attend", "Policy", "PolicyConfig"]
