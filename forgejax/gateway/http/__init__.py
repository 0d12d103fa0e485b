"""HTTP: bodies in, answers and streams out, and the paths agents try."""
