"""The inference side as the rest of a run sees it."""
