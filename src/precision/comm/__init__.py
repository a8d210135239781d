"""Weights gathered, and gradients reduced, as codes: two collectives of FSDP2 in place of its own."""

from .gather import gather_codes as gather_codes
from .reduce import reduce_codes as reduce_codes
