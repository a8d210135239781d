"""The trainer: Hydra config in, run directory out. Start reading at ``loop.py``."""

import os

# Threads that spin while they wait take the cores of whoever works: beside one busy process a run on all cores made a
# fifteenth of its speed. OpenMP reads this once, when torch is loaded; who has chosen a way keeps it.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
