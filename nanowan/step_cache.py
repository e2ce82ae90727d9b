"""EasyCache: skip the model in some sampling steps, an approximation whose error `diag.py reuse` measures."""


class EasyCache:
    """Sampling steps without the model (Zhou et al., "Less is Enough", 2025). The difference between velocity and
    latent changes slowly. The last computed difference is used again as long as the change expected since then,
    relative to the velocity, stays below `threshold`. threshold 0: compute every step. computed: model evaluations so
    far.
    """

    def __init__(self, threshold=0.0):
        self.threshold, self.computed = threshold, 0
        self.reset()

    def reset(self):
        """Forget what was computed, before another expert takes over."""
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
