"""The machinery around the models: files, pipeline, memory, ranks, training and variants."""
