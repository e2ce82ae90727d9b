"""Settings that PyTorch and its libraries read when they are loaded: imported first by the scripts."""

import os

# Idle OpenMP threads sleep instead of spinning: beside another busy process spinning made a step 40 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
