"""Animate-2-14B: the model, conditioning and training samples."""
