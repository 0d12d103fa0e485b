"""Ways to run an agent program, all behind ``forgejax.agents.scaffolds.base.Scaffold``."""
