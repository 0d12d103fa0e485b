"""What a configuration needs of a mesh, on any machine: bytes a chip, what chips exchange, seconds of a step."""
