"""EasyCache: sampling steps taken without the model, an approximation whose cost diag.py reuse measures."""


class EasyCache:
    """Steps taken without the model (Zhou et al., "Less is Enough", 2025): velocity minus latent changes slowly, so the
    last one computed serves again while the change expected since then stays below `threshold` of the velocity.
    threshold 0: never. computed: model evaluations so far.
    """

    def __init__(self, threshold=0.0):
        self.threshold, self.computed = threshold, 0
        self.reset()

    def reset(self):
        """Forget what was computed: another expert is next."""
        self.v = self.rate = None

    def predict(self, x):
        """The velocity at x, or None where it is to be computed."""
        if not self.threshold or self.rate is None:
            return None
        self.error += (self.rate * (x - self.seen).norm() / self.v.norm()).item()
        self.seen = x
        return x + self.offset if self.error < self.threshold else None

    def update(self, x, v):
        """The velocity v was computed at x."""
        if self.v is not None:
            self.rate = (v - self.v).norm() / (x - self.x).norm()
        self.computed, self.x, self.seen, self.v, self.offset, self.error = self.computed + 1, x, x, v, v - x, 0.0
