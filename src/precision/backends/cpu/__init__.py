"""Compiled C++ kernels for CPUs."""
