"""Triton kernels compiled ahead of time, for GPUs that need not be there: PTX, machine code, registers, shared memory.

    with recording((9, 0)) as launches:
        quantize_fused(torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta"), spec)
    compiled = [compile(launch, 90) for launch in launches]

What is compiled is what a GPU would be given for such a call: the same constants, pointers aligned to 16 bytes,
integers specialized where they are 1 or multiples of 16.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from narrowgauge.precision.backends.triton.amax import tile_amax
from narrowgauge.precision.backends.triton.both import quantize_both
from narrowgauge.precision.backends.triton.device import Launch
from narrowgauge.precision.backends.triton.fused import StateMatrix, Step, adamw, adamw_amaxes, quantize_gradients
from narrowgauge.precision.backends.triton.quantize import prepare_fused, quantize_fused
from narrowgauge.precision.backends.triton.quantizer import Triton, hadamard, scaled_output, swizzled
from narrowgauge.precision.formats import E2M1, E4M3, E5M2
from narrowgauge.precision.noise import Noise
from narrowgauge.precision.quantize import Quantized
from narrowgauge.precision.scaling import TENSOR, Fp32, Fp32Decode, PowerOfTwo, Tile, TwoLevel
from narrowgauge.precision.spec import OperandSpec, Rounding
from narrowgauge.precision.swiglu import Gradients, Hidden
from narrowgauge.precision.transforms import Hadamard
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (89, 90, 100, 120)
"""Ada, Hopper, data-centre Blackwell, workstation Blackwell."""

WRITTEN = {
    "amax_kernel": {"out": False, "out_t": False},
    "quantize_kernel": {"codes": False, "scales": False, "tensor_scale": False, "note": True},
    "quantize_both_kernel": {
        **dict.fromkeys(("codes", "scales", "codes_t", "scales_t", "tensor_scale"), False),
        "note": True,
    },
    "hadamard_kernel": {"out": False},
    "swizzle_kernel": {"out": False},
    "values_kernel": {"out": False},
    "swiglu_backward_amax_kernel": {"gate_out": False, "up_out": False},
    "swiglu_backward_kernel": {
        f"{of}_{what}": False for of in ("gate", "up") for what in ("codes", "scales", "tensor_scale")
    },
    "adamw_kernel": {"m": True, "v": True, "w": True, "m_new": False, "v_new": False, "w_new": False, "weight": False},
}
"""What each kernel writes; True where it reads it first."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as machine code for one architecture.

    Args:
        ptx: its assembly.
        cubin: its machine code.
        registers: of a thread.
        spilled: bytes a thread keeps in memory for want of registers.
        shared: bytes of shared memory of a program.
    """

    ptx: str
    cubin: bytes
    registers: int
    spilled: int
    shared: int

    def count(self, pattern: str) -> int:
        """How often the pattern occurs in the assembly."""
        return len(re.findall(pattern, self.ptx))


def compile(launch: Launch, architecture: int) -> Compiled:
    """Raises what triton raises where a kernel does not compile."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (_is_int(value) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[place,] = [["tt.divisibility", 16]]
        elif _is_int(value):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    log = io.StringIO()
    # The assembler says what it used, unless the machine code comes from the cache.
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(
        ptx=made.asm["ptx"],
        cubin=made.asm["cubin"],
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spilled=_number(r"(\d+) bytes spill stores", log.getvalue()),
        shared=made.metadata.shared,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"the assembler did not say what it used: {log.strip()[:200]!r}")
    return int(found[1])


def cases() -> dict[str, Callable[[], object]]:
    """Calls that stand for all kernels, by name; to be made while ``recording``. A matrix has 8192 x 8192 elements."""
    x = torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, dtype=torch.int32, device="meta")
    noise = Noise(key=key, row_offset=torch.empty((), dtype=torch.int64, device="meta"))
    columns = Noise(key=key, row_offset=noise.row_offset, transposed=True)
    count = torch.empty((), dtype=torch.int64, device="meta")

    def parts(transposed: bool) -> Noise:
        return Noise.of(base=key, step=count, first_sample=count, rows_of_a_sample=4096, transposed=transposed)

    fp8, e5m2 = OperandSpec(format=E4M3), OperandSpec(format=E5M2)
    row = replace(fp8, tile=Tile(1, -1), scale=Fp32(pow2=True, eps=1e-12))
    block = replace(fp8, tile=Tile(1, 128), scale=Fp32(pow2=True, input_max=True))
    mxfp8 = replace(fp8, tile=Tile(1, 32), scale=PowerOfTwo())
    mxfp4 = OperandSpec(format=E2M1, tile=Tile(1, 32), scale=PowerOfTwo(), rounding=Rounding.STOCHASTIC)
    nvfp4 = OperandSpec(format=E2M1, tile=Tile(1, 16), scale=TwoLevel())
    gradient = replace(nvfp4, rounding=Rounding.STOCHASTIC)
    te, seeded = Hadamard(), Hadamard(size=32, signs=0)
    top, top_of_channels = torch.empty(1, device="meta"), torch.empty(8192, device="meta")
    h = Hidden(x, x, top_of_channels, 1)
    gradients = Gradients(x, x, x, top_of_channels, 0)
    made: dict[str, Callable[[], object]] = {
        "fp8 tensor": lambda: quantize_fused(x, fp8),
        "fp8 tensor, e5m2, amax given": lambda: quantize_fused(x, e5m2, amax=top),
        "fp8 row": lambda: quantize_fused(x, row),
        "fp8 row, columns": lambda: quantize_fused(x.mT, row),
        "fp8 1x128": lambda: quantize_fused(x, block),
        "fp8 1x128, scales by column": lambda: quantize_fused(x, block, by_column=True),
        "fp8 1x128, columns": lambda: quantize_fused(x.mT, block),
        "fp8 128x128": lambda: quantize_fused(x, replace(block, tile=Tile(128, 128))),
        "mxfp8": lambda: quantize_fused(x, mxfp8),
        "mxfp8, columns": lambda: quantize_fused(x.mT, mxfp8),
        "mxfp8, rows and columns": lambda: quantize_both(x, mxfp8),
        "fp8 1x128, rows and columns": lambda: quantize_both(x, block),
        "fp8 1x128, rows and columns, scales by column": lambda: quantize_both(x, block, by_column=True),
        "fp8 tensor, rows and columns": lambda: quantize_both(x, fp8),
        "fp8 tensor, rows and columns, amax given and noted": lambda: quantize_both(x, fp8, amax=top, note=top),
        "fp8 row, rows and columns": lambda: quantize_both(x, row),
        "fp8 tensor, amax given and noted": lambda: quantize_fused(x, fp8, amax=top, note=top),
        "mxfp8, as bf16": lambda: prepare_fused(x, mxfp8),
        "mxfp8, rows and columns, as bf16": lambda: quantize_both(x, mxfp8, values=True),
        "nvfp4, sr, rows and columns, as bf16, amax given": lambda: quantize_both(
            x, gradient, amax=top, noise=(parts(False), parts(True)), values=True
        ),
        "mxfp4, columns, hadamard32, sr": lambda: quantize_fused(x.mT, mxfp4, noise=columns, transform=seeded),
        "nvfp4": lambda: quantize_fused(x, nvfp4),
        "nvfp4 16x16": lambda: quantize_fused(x, replace(nvfp4, tile=Tile(16, 16))),
        "nvfp4, sr": lambda: quantize_fused(x, gradient, noise=noise),
        "nvfp4, columns, hadamard16": lambda: quantize_fused(x.mT, nvfp4, transform=te),
        "nvfp4, columns, hadamard16, sr": lambda: quantize_fused(x.mT, gradient, noise=columns, transform=te),
        "hadamard16": lambda: hadamard(x, te),
        "swizzle": lambda: swizzled(torch.empty(8192, 512, dtype=torch.uint8, device="meta")),
        "adamw, fp32": lambda: _adamw(None),
        "adamw, e4m3 in blocks of 128": lambda: _adamw(Tile(1, 128)),
        "adamw, e4m3 under one scale": lambda: _adamw(TENSOR),
        "smooth swiglu, channel amax": lambda: tile_amax(Hidden(x, x), Tile(-1, 1)),
        "smooth swiglu to fp8 tensor, amax given": lambda: quantize_fused(h, fp8, amax=top),
        "smooth swiglu to mxfp8, rows and columns": lambda: quantize_both(h, mxfp8),
        "smooth swiglu to nvfp4, columns, hadamard16": lambda: quantize_fused(h.mT, nvfp4, transform=te),
        "smooth swiglu backward to e5m2 tensor": lambda: quantize_gradients(gradients, e5m2),
        "smooth swiglu backward to mxfp8": lambda: quantize_gradients(gradients, mxfp8),
        "smooth swiglu backward to nvfp4, columns, hadamard16, sr": lambda: quantize_gradients(
            gradients.mT, gradient, noises=(columns, columns), transform=te
        ),
        "mxfp8 to bf16": lambda: Triton().values(_codes(mxfp8), _factors(mxfp8), torch.bfloat16),
        "output of two factors": lambda: scaled_output(x.float(), (top, top), None, torch.bfloat16),
        "nvfp4 to bf16": lambda: Triton().values(_codes(nvfp4), _factors(nvfp4), torch.bfloat16),
    }
    return made


def _adamw(tile: Tile | None) -> None:
    """FP32 weights and a BF16 gradient; moments in E4M3 under a gate, or FP32."""
    step = Step(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1, t=1)
    grad = torch.empty(8192, 8192, dtype=torch.bfloat16, device="meta")
    w = StateMatrix(values=torch.empty(8192, 8192, device="meta"))
    if tile is None:
        adamw(
            grad, replace(w, values=torch.empty_like(w.values)), replace(w, values=torch.empty_like(w.values)), w, step
        )
        return
    spec = OperandSpec(format=E4M3, tile=tile, scale=Fp32Decode(floor=1e-30))
    m, v = (StateMatrix(values=_codes(spec).codes, scales=_factors(spec), spec=spec) for _ in range(2))
    gate = torch.empty(2, device="meta")
    adamw(grad, m, v, w, step, amaxes=adamw_amaxes(grad, m, v, w, step, gate=gate) if m.per_tensor else None, gate=gate)


def _factors(spec: OperandSpec) -> Tensor:
    return torch.empty(spec.tile.grid(8192, 8192), device="meta")


def _codes(spec: OperandSpec) -> Quantized:
    codes = torch.empty(8192, 8192 * spec.format.bits // 8, dtype=torch.uint8, device="meta")
    scales = _factors(spec) if spec.scale.format is None else _factors(spec).to(torch.uint8)
    tensor = torch.empty((), device="meta") if spec.scale.levels == 2 else None
    return Quantized(codes=codes, scales=scales, tensor_scale=tensor, shape=(8192, 8192), spec=spec)
