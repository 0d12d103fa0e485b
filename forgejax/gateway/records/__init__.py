"""Sessions on the disk: what was asked and drawn, line by line, and the same played again."""
