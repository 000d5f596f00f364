"""Networks that know a modality but no task."""
