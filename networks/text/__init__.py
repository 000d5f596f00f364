"""Tokenizers, frozen text encoders and trainable text networks."""
