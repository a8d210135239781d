"""A stand-in for ``scaled_mm`` on tensor cores, made from the documents alone.

``Hardware`` holds a call to what torch is documented to take on an architecture, then computes it in float64 from
nothing but the arguments, reading codes, strides and swizzled scales as the documents lay them out.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from narrowgauge.precision.backends import Quantizer, scaled_mm
from narrowgauge.precision.backends.scaled_mm import ScaledMM
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType, SwizzleType
from torch.nn.functional import scaled_mm as torch_scaled_mm

T, R, B128, S128 = (
    ScalingType.TensorWise,
    ScalingType.RowWise,
    ScalingType.BlockWise1x128,
    ScalingType.BlockWise128x128,
)
MX, NV = ScalingType.BlockWise1x32, ScalingType.BlockWise1x16
E2M1_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
#: Where each pair of recipes for scales is documented to run.
WHERE = {
    ((T,), (T,)): (89, 90, 100, 120),
    ((R,), (R,)): (89, 90, 100, 120),
    ((B128,), (S128,)): (90,),
    ((B128,), (B128,)): (90,),
    ((S128,), (B128,)): (90,),
    ((MX,), (MX,)): (100, 120),
    ((NV, T), (NV, T)): (100, 120),
}


@dataclass
class Hardware:
    """``scaled_mm`` of one architecture, by the documents; remembers what it was asked for."""

    arch: int
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    fast: list[bool] = field(default_factory=list)  # of each call: whether its sums may have fewer bits

    def __call__(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        scale_a: list[Tensor],
        recipe_a: list[ScalingType],
        scale_b: list[Tensor],
        recipe_b: list[ScalingType],
        *,
        swizzle_a: list[SwizzleType],
        swizzle_b: list[SwizzleType],
        bias: Tensor | None,
        output_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        arguments = (mat_a, mat_b, scale_a, recipe_a, scale_b, recipe_b)
        swizzles = {"swizzle_a": swizzle_a, "swizzle_b": swizzle_b}
        torch_takes(*arguments, **swizzles, bias=bias, output_dtype=output_dtype)
        assert self.arch in WHERE[tuple(recipe_a), tuple(recipe_b)]
        fp4 = mat_a.dtype == torch.float4_e2m1fn_x2
        m, n, k = mat_a.shape[0], mat_b.shape[1], mat_a.shape[1] * (1 + fp4)
        assert mat_a.stride() == (mat_a.shape[1], 1)
        assert mat_b.stride() == (1, mat_b.shape[0])
        assert n % 16 == 0
        assert k % (32 if fp4 else 16) == 0
        for tensor in (mat_a, mat_b):  # TMA reads from 16 bytes on
            assert tensor.storage_offset() % 16 == 0
        assert (mat_a.dtype, mat_b.dtype) != (torch.float8_e5m2, torch.float8_e5m2)
        if recipe_a[0] not in (T, R):
            assert mat_a.dtype == mat_b.dtype == (torch.float4_e2m1fn_x2 if recipe_a[0] is NV else torch.float8_e4m3fn)
        if recipe_a[0] is R:
            assert mat_b.dtype == torch.float8_e4m3fn
            assert output_dtype == torch.bfloat16  # FP32 comes out of Hopper's kernel alone
        if B128 in (recipe_a[0], recipe_b[0]):
            assert m % 4 == n % 128 == k % 128 == 0
        if use_fast_accum:  # torch refuses them for blocks; cuBLAS has none for MX and NV
            assert recipe_a[0] in (T, R)
        assert output_dtype in (torch.bfloat16, torch.float16, torch.float32)
        if bias is not None:
            assert output_dtype != torch.float32
            assert (bias.dtype, bias.shape) == (output_dtype, (n,))
            assert recipe_a[0] in (T, R)
        self.fast.append(use_fast_accum)
        self.calls.append((tuple(recipe_a), tuple(recipe_b), (m, n, k), output_dtype, bias is not None))
        a = values(mat_a) * spread(scale_a, recipe_a, swizzle_a, m, k)
        b = values(mat_b.t()) * spread([s.t() if recipe_b == [R] else s for s in scale_b], recipe_b, swizzle_b, n, k)
        y = a @ b.t()
        return (y if bias is None else y + bias.double()).to(output_dtype)


def torch_takes(*arguments: Any, **more: Any) -> None:
    """torch's own check of a call on a GPU: shapes, strides, dtypes, swizzles."""

    def on_gpu(value: Any) -> Any:
        if isinstance(value, Tensor):
            plain = torch.empty_strided(value.shape, value.stride(), dtype=torch.uint8, device="cuda")
            wide = value.dtype if value.element_size() > 1 else None
            return plain.view(value.dtype) if wide is None else torch.empty_like(plain, dtype=wide)
        return [on_gpu(part) for part in value] if isinstance(value, list) else value

    with FakeTensorMode():
        torch_scaled_mm(*map(on_gpu, arguments), **{key: on_gpu(value) for key, value in more.items()})


def values(codes: Tensor) -> Tensor:
    """Float64 values of a matrix of codes, by torch's own cast; of FP4 pairs the low nibble comes first."""
    if codes.dtype != torch.float4_e2m1fn_x2:
        return codes.double()
    pairs = codes.view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).int()
    return torch.where(nibbles >= 8, -1, 1) * E2M1_VALUES[nibbles & 7].double()


def spread(scales: list[Tensor], recipes: list[ScalingType], swizzles: list[SwizzleType], rows: int, k: int) -> Tensor:
    """The decode scale of every element [rows, k], float64."""
    scale, recipe = scales[0], recipes[0]
    vector = {MX: 32, NV: 16}.get(recipe)
    assert len(scales) == len(recipes) == len(swizzles)
    assert swizzles[0] is (SwizzleType.NO_SWIZZLE if vector is None else SwizzleType.SWIZZLE_32_4_4)
    if recipe is T:
        return scale.double().reshape(1, 1)
    if recipe is R:
        assert scale.shape == (rows, 1)
        return scale.double()
    if recipe is B128:
        assert scale.shape == (rows, k // 128)
        assert scale.stride(0) == 1
        return scale.double().repeat_interleave(128, 1)
    if recipe is S128:
        squares = -(-k // 512) * 4
        assert scale.shape == (squares, rows // 128)
        assert scale.stride(0) == 1
        return scale.double()[: k // 128].repeat_interleave(128, 0).repeat_interleave(128, 1).t()
    assert vector is not None
    flat = scale.double()
    columns = -(-(k // vector) // 4) * 4
    row, column = torch.arange(rows)[:, None], torch.arange(k // vector)
    block = (row // 128) * (columns // 4) + column // 4
    place = block * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
    tensor = scales[1].double() if len(scales) > 1 else 1.0
    return (flat[place] * tensor).repeat_interleave(vector, 1)


choosing: Any = importlib.import_module("narrowgauge.precision.backends.choose")  # whose name is a function's, too


@contextmanager
def pretend(
    monkeypatch: pytest.MonkeyPatch, arch: int, quantizers: tuple[Quantizer, ...] = choosing.QUANTIZERS
) -> Iterator[Hardware]:
    """A model on the CPU is taken for one on a GPU of this architecture; ``quantizers`` make its codes."""
    hardware = Hardware(arch)
    with monkeypatch.context() as patch:
        patch.setattr(scaled_mm, "scaled_mm", hardware)
        pairs = choosing.native(ScaledMM(detect=lambda device: arch), quantizers)
        others = [backend for backend in choosing.ORDER if backend.name != "scaled_mm"]
        patch.setattr(choosing, "ORDER", (*pairs, *others))
        yield hardware


def sqnr(ours: Tensor, exact: Tensor) -> float:
    """In dB."""
    noise = (ours.double() - exact.double()).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(exact.double().norm() / noise))
