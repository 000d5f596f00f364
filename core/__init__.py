"""The modality-agnostic core: paths, sources, losses, guidance, solvers, backbones and training."""
