"""Settings that PyTorch and its libraries read when they are loaded. Scripts import this before torch."""

import os

# Idle OpenMP threads sleep instead of spinning: beside another busy process, spinning makes a step tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
