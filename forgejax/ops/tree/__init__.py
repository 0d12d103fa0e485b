"""Tree attention: one public function, one file a backend, one oracle."""
