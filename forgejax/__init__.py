"""forgejax: agent reinforcement learning on JAX."""
