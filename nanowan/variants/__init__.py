"""The Wan 2.2 model variants: the inputs that each of them takes in sampling and in training."""
