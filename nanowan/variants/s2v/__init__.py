"""S2V-14B: model, speech encoder, conditioning and training samples."""
