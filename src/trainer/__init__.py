"""The trainer: Hydra config in, run directory out. Start reading at ``loop.py``."""
