"""Image to metric depth."""
