"""White-box agents: the client they ask the policy with, their dialogues, and what they do to their contexts."""

from forgejax.agents.white_box.client import ContextFullError, PolicyClient, Said, SaidCall
from forgejax.agents.white_box.context import CONTEXT_FUNCTIONS, ContextConfig
from forgejax.agents.white_box.dialogue import Dialogue, PolicyAccess

__all__ = [
    "CONTEXT_FUNCTIONS",
    "ContextConfig",
    "ContextFullError",
    "Dialogue",
    "PolicyAccess",
    "PolicyClient",
    "Said",
    "SaidCall",
]
