"""Which specs kernels take, and the constants of formats and scale rules that they are compiled for.

Kernels take formats and rules by their exact type: whatever else a recipe brings may round otherwise, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats import E2M1, E4M3, E5M2, ExMy, Integer, NumberFormat
from ...scaling import FP32_MAX, TENSOR, Fp32, Fp32Decode, Power, PowerOfTwo, ScaleRule, TwoLevel, Unit
from ...spec import OperandSpec, Rounding
from ..interface import mapped_otherwise
from .blocks import tile_fits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.TRUNCATE: 2}
KINDS: dict[type, int] = {Unit: 0, Fp32: 1, Fp32Decode: 2, PowerOfTwo: 3, TwoLevel: 4}
MODES = {Power.FLOOR: 0, Power.CEIL: 1, Power.EVEN: 2, Power.RCEIL: 3}
CONVERSIONS: dict[NumberFormat, int] = {E4M3: 1, E5M2: 2, E2M1: 3}  # formats that have instructions


def format_fits(format: NumberFormat) -> bool:
    if type(format) is Integer:
        return format.bits <= 8
    return type(format) is ExMy and format.bits <= 8 and format.mantissa_bits > 0 and format.min_exponent > -126


def rule_fits(rule: ScaleRule) -> bool:
    if type(rule) is TwoLevel:
        return format_fits(rule.block) and rule.outer == TENSOR
    if type(rule) is PowerOfTwo:
        return rule.mode in MODES
    return type(rule) in KINDS


def lacking(spec: OperandSpec) -> str | None:
    """Why kernels do not take a spec, or None."""
    if not format_fits(spec.format):
        return f"no kernel for {spec.format}"
    if not tile_fits(spec.tile):
        return f"no kernel for tiles of {spec.tile}"
    if not rule_fits(spec.scale):
        return f"no kernel for scales by {spec.scale}"
    return mapped_otherwise(spec)


def takes_tensor_amax(spec: OperandSpec) -> bool:
    """Whether the amax that a scale is made of may be given as one number."""
    return spec.scale.levels == 2 or (spec.scale.levels == 1 and spec.tile == TENSOR)


def one_factor(spec: OperandSpec) -> bool:
    """Whether BF16 values are code values, to be multiplied by one FP32 scale of the tensor, or by none."""
    return spec.scale.levels == 0 or (spec.tile == TENSOR and spec.scale.format is None)


def values_fit(spec: OperandSpec) -> bool:
    """Whether ``prepare_fused`` gives BF16: exact products of code values and tiles' scales, or code values alone."""
    element, rule = spec.format, spec.scale
    if not format_fits(element) or not rule_fits(rule) or element.significant_bits > 8:
        return False
    if isinstance(rule, TwoLevel):
        return element.significant_bits + rule.block.significant_bits <= 8
    return one_factor(spec) or (rule.power_of_two and element.tiny_exponent >= -126)


@dataclass(frozen=True, slots=True)
class Grid:
    """A number format as constants of a kernel."""

    bits: int
    m: int
    low: int  # exponent field of the smallest normal value
    high: int
    bias_shift: int
    max: float
    max_code: int
    nan_code: int
    has_nan: bool
    inf_code: int
    integer: bool
    least_normal: float
    to_small: float
    from_small: float
    hardware: int  # of CONVERSIONS, or 0


def grid_of(format: NumberFormat) -> Grid:
    assert isinstance(format, (ExMy, Integer)), "kernels know no other"
    return Grid(
        bits=format.bits,
        m=format.mantissa_bits,
        low=format.min_exponent + 127,
        high=max(format.min_exponent, format.max_exponent) + 127,
        bias_shift=(126 + format.min_exponent) << format.mantissa_bits,
        max=format.max,
        max_code=format.max_code,
        nan_code=format.max_code if format.nan is None else format.nan,
        has_nan=format.nan is not None,
        inf_code=format.max_code + 1 if isinstance(format, ExMy) and format.inf else 1 << 30,
        integer=isinstance(format, Integer),
        least_normal=2.0**format.min_exponent,
        to_small=2.0**-format.tiny_exponent,
        from_small=2.0**format.tiny_exponent,
        hardware=CONVERSIONS.get(format, 0),
    )


@dataclass(frozen=True, slots=True)
class ScaleConstants:
    """A scale rule as constants of a kernel; every real number is one of FP32."""

    kind: int
    mode: int = 0  # of powers of two
    top: float = 1.0  # max, times 2^-margin or times the largest block scale
    floor: float = 0.0  # of amax
    limit: float = 1.0  # what an infinite encode scale becomes
    pow2: bool = False
    inverse_max: float = 1.0  # 1 / max, rounded once
    max_exponent: int = 0
    half_bit: int = 0
    element_has_nan: bool = True
    block: Grid | None = None


def rule_of(spec: OperandSpec, dtype: torch.dtype) -> ScaleConstants:
    """The spec's scale rule as constants of a kernel; ``dtype`` is that of the input. Raises KeyError for others."""
    element, rule = spec.format, spec.scale
    kind = KINDS[type(rule)]
    inverse = float(1.0 / torch.tensor(element.max, dtype=torch.float32))
    if isinstance(rule, Unit):
        return ScaleConstants(kind)
    if isinstance(rule, Fp32):
        return ScaleConstants(
            kind,
            top=_fp32(element.max * 2.0**-rule.margin),
            floor=_fp32(rule.eps),
            limit=torch.finfo(dtype).max if rule.input_max and dtype != torch.float64 else FP32_MAX,
            pow2=rule.pow2,
            element_has_nan=element.nan is not None,
        )
    if isinstance(rule, Fp32Decode):
        return ScaleConstants(kind, top=element.max, floor=_fp32(rule.floor), pow2=rule.ceil_pow2)
    if isinstance(rule, PowerOfTwo):
        return ScaleConstants(
            kind,
            mode=MODES[rule.mode],
            inverse_max=inverse,
            max_exponent=element.max_exponent,
            half_bit=1 << (22 - element.mantissa_bits),
        )
    assert isinstance(rule, TwoLevel)
    top = _fp32(element.max * (rule.block_max or rule.block.max))
    return ScaleConstants(kind, top=top, limit=FP32_MAX, inverse_max=inverse, block=grid_of(rule.block))


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a kernel quantizes, as its constants.

    Args:
        given: whether the amaxes of tiles are; where the tile is the tensor, whether that of the tensor is.
        parts: of the tensor's amax.
        values: 0 for codes; BF16 for code values (1), or for code values times their tile's scale (2).
        by_column: as in ``Triton``.
    """

    element: Grid
    rule: ScaleConstants
    rounding: int
    given: bool
    parts: int
    values: int
    by_column: bool
    hardware: bool
    e2m1_hardware: bool
