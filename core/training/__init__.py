"""The training loop and what it keeps: state, moving averages, optimisers, tracking."""
