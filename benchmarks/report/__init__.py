"""Results beside the published numbers."""
