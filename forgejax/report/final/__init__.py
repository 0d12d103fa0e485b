"""What a run ends with: summary, curve and page."""
