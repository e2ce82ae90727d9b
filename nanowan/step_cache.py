"""EasyCache: skip the model in some sampling steps, an approximation whose error `diag.py reuse` measures."""


class EasyCache:
    """A cache with which sampling skips the model in some steps (Zhou et al., "Less is Enough", 2025). The difference
    between velocity and latent changes slowly. The last computed difference is reused until the estimated change of the
    velocity since then, relative to the velocity and summed over the steps, reaches `threshold`. With threshold 0, the
    model computes every step. computed: number of model evaluations so far.
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
