"""Image to caption."""
