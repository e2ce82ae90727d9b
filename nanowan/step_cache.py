"""EasyCache: skip the model in some sampling steps. The result is approximate; `diag.py reuse` measures the error."""


class EasyCache:
    """A cache with which sampling skips the model in some steps (Zhou et al., "Less is Enough", 2025). The difference
    between velocity and latent changes slowly, so a skipped step reuses the difference that was computed last. For each
    step, the change of the velocity is estimated, as a fraction of its norm. When the sum of these fractions since the
    last computed step reaches `threshold`, the model computes the step. With threshold 0, the model computes every
    step. computed: number of model evaluations so far.
    """

    def __init__(self, threshold=0.0):
        self.threshold, self.computed = threshold, 0
        self.reset()

    def reset(self):
        """Forget all computed velocities. Called before another expert takes over."""
        self.v = self.rate = None

    def predict(self, x):
        """Return the predicted velocity at x, or None if the model must compute it."""
        if not self.threshold or self.rate is None:
            return None
        self.error += (self.rate * (x - self.seen).norm() / self.v.norm()).item()
        self.seen = x
        return x + self.offset if self.error < self.threshold else None

    def update(self, x, v):
        """Store the velocity v that the model computed at x."""
        if self.v is not None:
            self.rate = (v - self.v).norm() / (x - self.x).norm()
        self.computed, self.x, self.seen, self.v, self.offset, self.error = self.computed + 1, x, x, v, v - x, 0.0
