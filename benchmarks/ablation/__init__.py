"""Which variant works: groups of runs and their comparison."""
