"""A run from its configuration to its report: the only room that knows all the others."""
