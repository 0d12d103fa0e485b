"""What a run tells people: metrics, live progress, summary, curve and page. It reads and never steers; no jax here."""
