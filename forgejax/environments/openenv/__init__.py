"""Environments elsewhere that speak OpenEnv's protocol."""

from forgejax.environments.openenv.environment import OpenEnv, OpenEnvConfig

__all__ = ["OpenEnv", "OpenEnvConfig"]
