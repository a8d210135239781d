"""Doors for other trainers."""
