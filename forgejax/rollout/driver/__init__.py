"""The engine's own thread: who waits, who decodes, what was drawn."""
