"""Hydra accepts launchers from packages under ``hydra_plugins`` only."""
