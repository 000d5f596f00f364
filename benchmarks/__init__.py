"""Evaluation of runs, ablation grids, and tables beside the papers' numbers."""
