"""Samples to packed trees. numpy only."""
