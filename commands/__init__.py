"""One file per command: its options, one call, what it prints."""
