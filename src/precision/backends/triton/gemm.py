"""Matrix products of codes by Triton, on the tensor cores for narrow formats, chosen by name only: ``triton_dot``.

Operands are those of the ``triton`` backend, bit for bit; sums are FP32, in the tensor core's order, so products differ
from the emulation's as two orders of summation do (on Hopper FP8 sums keep some 14 bits between additions in FP32,
every 128 products). MX and NVFP4 blocks go to ``tl.dot_scaled``: block-scaled instructions on Blackwell, BF16 on
older ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats import E2M1, E4M3, E5M2, pack4, unpack4
from ...quantize import Prepared, Quantized
from ...scaling import TENSOR, Fp32, Fp32Decode, PowerOfTwo, Tile, TwoLevel
from ...spec import GemmSpec, OperandSpec
from .quantizer import Triton, capability, interpreted, launch, version

_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class TritonDot(Triton):
    """The ``triton`` backend with products on tensor cores."""

    name = "triton_dot"
    multiplies_codes = True

    def why_not(self, gemm: GemmSpec, shape: tuple[int | None, int, int], device: torch.device) -> str | None:
        if gemm.a is None or gemm.b is None:
            return "an operand is left in high precision"
        kinds = (_kind(gemm.a), _kind(gemm.b))
        if None in kinds or kinds[0] != kinds[1]:
            return f"no narrow product of {gemm.a} x {gemm.b}"
        if reason := super().why_not(gemm, shape, device):
            return reason
        if kinds[0] == "nvfp4" and (0, 0) < capability(device) < (10, 0) and version() < (3, 8):
            return "triton before 3.8 does not compile products of blocks with E4M3 scales for GPUs before Blackwell"
        return None

    def gemm(
        self,
        a: Quantized | Prepared | Tensor,
        b: Quantized | Prepared | Tensor,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        assert isinstance(a, Quantized)
        assert isinstance(b, Quantized)
        return product(a, b, bias=bias, dtype=dtype)

    def note(self, gemm: GemmSpec) -> str:
        return "narrow product" + (", no sums fast" if gemm.fast_accum else "")


def product(a: Quantized, b: Quantized, *, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a [m, k] @ b [n, k].mT + bias [n], rounded once to ``dtype``: FP32, BF16 or FP16."""
    from . import gemm_kernels as kernels
    from .kernels import grid_of

    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=a.codes.device)
    if m * n * k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand(m, n))
    bias = bias.float() if bias is not None else None
    target = out.view(torch.int16) if dtype == torch.bfloat16 else out
    scaled = _kind(a.spec) != "fp8"
    block = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8}
    if scaled and capability(a.codes.device) < (9, 0):
        block["BLOCK_M"] = 64  # decoded to BF16 in registers: they do not hold more
    programs = -(-m // block["BLOCK_M"]) * -(-n // block["BLOCK_N"])
    left, right = _codes(a), _codes(b)
    sizes = (m, n, k, *left.stride(), *right.stride())
    if not scaled:
        views = [x.view(_FP8[q.spec.format.name]) for x, q in ((left, a), (right, b))]
        scales = [q.scales.reshape(-1).contiguous() for q in (a, b)]
        launch(
            kernels.fp8_gemm_kernel,
            programs,
            *(views[0], scales[0], views[1], scales[1], bias, target),
            *sizes,
            A_ROWS=a.spec.tile != TENSOR,
            B_ROWS=b.spec.tile != TENSOR,
            SPLIT=True,
            **block,
            num_warps=8,
        )
        return out
    two_level = isinstance(a.spec.scale, TwoLevel)
    arguments: list[Any] = []
    for q, codes in ((a, left), (b, right)):
        of_blocks = (q.scales.mT if q.transposed else q.scales).contiguous()
        arguments += [codes, of_blocks, q.tensor_scale.reshape(1) if q.tensor_scale is not None else None]
    launch(
        kernels.block_scaled_gemm_kernel,
        programs,
        *(*arguments, bias, target),
        *(*sizes, -(-k // a.spec.tile.inner)),
        A=a.spec.format.name,
        B=b.spec.format.name,
        E4M3_SCALES=two_level,
        F=grid_of(a.spec.format),
        S=grid_of(E4M3),
        DECODED=two_level and interpreted(),
        A_TALL=a.spec.tile.outer,
        B_TALL=b.spec.tile.outer,
        WIDE=a.spec.tile.inner,
        **block,
        num_warps=8,
    )
    return out


def _kind(spec: OperandSpec) -> str | None:
    """Which kernel takes an operand, or None. Operands of one kind can be multiplied."""
    tile, rule = spec.tile, spec.scale
    if spec.format in (E4M3, E5M2) and isinstance(rule, (Fp32, Fp32Decode)) and tile in (TENSOR, Tile(1, -1)):
        return "fp8"
    if spec.format in (E4M3, E5M2, E2M1) and isinstance(rule, PowerOfTwo) and tile in (Tile(1, 32), Tile(32, 32)):
        return "mx"
    e4m3 = isinstance(rule, TwoLevel) and rule.block == E4M3 and not rule.rows
    return "nvfp4" if spec.format == E2M1 and e4m3 and tile in (Tile(1, 16), Tile(16, 16)) else None


def _codes(q: Quantized) -> Tensor:
    """Codes [outer, inner], two of 4 bits a byte along the contraction; a view, but for transposed codes of 4 bits."""
    if not q.transposed:
        return q.codes
    return pack4(unpack4(q.codes, q.stored_shape[1]).mT) if q.spec.format.bits == 4 else q.codes.mT
