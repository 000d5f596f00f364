"""Codecs between pictures and latents."""
