"""The kinds of Wan 2.2 models: what each is given, in sampling and in training."""
