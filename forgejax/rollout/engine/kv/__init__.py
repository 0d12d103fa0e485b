"""Keys and values: where they lie, and which of them are kept."""
