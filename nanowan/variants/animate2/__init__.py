"""Animate-2-14B: model, conditioning and training samples."""
