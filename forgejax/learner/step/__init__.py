"""The jitted step."""
