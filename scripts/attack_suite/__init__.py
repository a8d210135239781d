"""The parts of ``scripts/attack.py``: what is attacked, how, and what right ends are."""
