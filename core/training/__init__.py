"""The training loop with its checkpoints, moving averages, optimisers and tracking."""
