"""Requests of a scaffold that are no part of its task: how they are known, and who answers them."""
