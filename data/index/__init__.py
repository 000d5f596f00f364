"""The index of large data: built once, kept in the user's cache, mapped into memory and shared by all processes."""
