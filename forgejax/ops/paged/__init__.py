"""Attention over pages of keys and values: one public function, one file a backend, one oracle."""
