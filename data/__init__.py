"""Items, splits, readers, caches and the embedded scenes."""
