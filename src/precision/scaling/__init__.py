"""Scales: over which tiles of a matrix they extend, what of a tile they are made of, and how that becomes one.

A rule turns a statistic of tiles, the absolute maximum (amax) in general, into ``Scales``: ``encode``, the FP32 factor
that values are multiplied by before they are rounded, and what is stored to get them back.

``tiles``          tiles of a matrix
``rules``          what a rule is; rules of one scale per tile
``two_level``      a scale per tile in a narrow format, under an FP32 scale of the tensor, of rows or of groups
``trial``          what a rule sees that decides after the codes
``four_over_six``  such a rule
``statistics``     what of a tile its scale is made of
``delayed``        amaxes of this tensor, of all ranks, or of earlier steps

Non-finite amax (an amax over values with a NaN is NaN):

===============  ==========================================  ====================================================
rule             inf                                         NaN
===============  ==========================================  ====================================================
Unit             nothing is scaled                           nothing is scaled
Fp32             scale 1: infinities saturate                scale 1; if the format has no NaN, decode scale NaN
Fp32Decode       decode inf, encode 0: the tile is NaN       the tile is NaN
PowerOfTwo       by the ratio: code 254; others: as if amax  code 255 = NaN: the tile is NaN
                 were 2^128. Saturated: it decodes to inf
TwoLevel         of the tensor: global encode scale 1; of    of the tensor: all is NaN; of a block: the block is
                 a block: its scale saturates                NaN
===============  ==========================================  ====================================================

``Delayed.update`` leaves the amax in use when the new one is zero or not finite.
"""

from .delayed import AmaxSource, Current, Delayed, Reduce
from .four_over_six import Error, Form, FourOverSix
from .rules import (
    FP32_MAX,
    FP32_TINY,
    MX_POWERS,
    Finishes,
    Fp32,
    Fp32Decode,
    Power,
    PowerOfTwo,
    Reads,
    ScaleRule,
    Scales,
    Unit,
    draws_noise,
    encode_power,
    finishes,
    outer_of,
    reads,
    takes_top,
)
from .statistics import AMAX, Amax, Mean, Quantile, Rms, Statistic, Std, statistic_of
from .tiles import ROW, TENSOR, Tile, scaled, spread, tiled
from .trial import Trial
from .two_level import TwoLevel

__all__ = [
    "AMAX",
    "FP32_MAX",
    "FP32_TINY",
    "MX_POWERS",
    "ROW",
    "TENSOR",
    "Amax",
    "AmaxSource",
    "Current",
    "Delayed",
    "Error",
    "Finishes",
    "Form",
    "FourOverSix",
    "Fp32",
    "Fp32Decode",
    "Mean",
    "Power",
    "PowerOfTwo",
    "Quantile",
    "Reads",
    "Reduce",
    "Rms",
    "ScaleRule",
    "Scales",
    "Statistic",
    "Std",
    "Tile",
    "Trial",
    "TwoLevel",
    "Unit",
    "draws_noise",
    "encode_power",
    "finishes",
    "outer_of",
    "reads",
    "scaled",
    "spread",
    "statistic_of",
    "takes_top",
    "tiled",
]
