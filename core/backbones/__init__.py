"""Flow networks and their size tables."""
