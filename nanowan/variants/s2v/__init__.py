"""S2V-14B: the model, speech encoder, conditioning and training samples."""
