"""Where a request stands in its session: what it goes on from, whether it was asked before, what is kept of it."""
