"""Animate-14B: model, conditioning, training samples, and the preparation of its inputs."""
