"""What all sides share: the generator, plan and messages, pages and command lines. No Flower."""

import os

__version__ = "0.1.0"

# Torch's threads wait for each other awake. Where other programs are at work, as in a hospital, one
# that waits takes the core of one that is waited for, and a training step takes fifty times as long
# (benchmarks/contention.py). The OpenMP library reads this once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # Some microseconds awake first: without them a step takes a quarter longer on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
