"""The data pool: a durable journal, the windowed FIFO and the Grain dataset of groups."""
