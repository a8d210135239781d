"""The parts of ``scripts/gpu_run.py``: what travels, what is measured, what it is held against."""
