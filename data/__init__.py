"""Data sets: items and splits, readers of the formats, feature caches, and the embedded scenes."""
