"""Animate-14B: the model, conditioning, training samples, and the preprocessing of its inputs."""
