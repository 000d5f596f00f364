"""Where a task meets the core: training, sampling, latents and the run directory."""
