"""What a run scores under a protocol."""
