"""Progress while a run goes on."""
