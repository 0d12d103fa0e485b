"""Task folders in Harbor's format: a workspace, an instruction, and tests that say what it was worth."""

from forgejax.environments.harbor.environment import Harbor
from forgejax.environments.harbor.tasks import HarborConfig

__all__ = ["Harbor", "HarborConfig"]
