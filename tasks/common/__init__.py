"""What several tasks share: text, images, codecs, scenes, readers, caches."""
