"""Every Triton kernel compiled for every architecture, without a GPU: instructions, registers, spills."""

from __future__ import annotations

import re

import pytest
import torch
from narrowgauge.precision.backends.triton.amax import tile_amax
from narrowgauge.precision.backends.triton.both import quantize_both
from narrowgauge.precision.backends.triton.device import recording, version
from narrowgauge.precision.backends.triton.quantize import quantize_fused
from narrowgauge.precision.formats import E4M3 as E4M3_FORMAT
from narrowgauge.precision.scaling import TENSOR
from narrowgauge.precision.spec import OperandSpec
from triton_aot import ARCHITECTURES, Compiled, cases, compile

E4M3 = r"cvt\.rn\.satfinite\.e4m3x2\.f32"
E5M2 = r"cvt\.rn\.satfinite\.e5m2x2\.f32"
E2M1 = r"cvt\.rn\.satfinite\.e2m1x2\.f32"
CASES = cases()


def compiled(name: str, architecture: int) -> dict[str, Compiled]:
    """By kernel."""
    with recording(divmod(architecture, 10)) as launches:
        CASES[name]()
    assert launches
    return {launch.kernel.__name__: compile(launch, architecture) for launch in launches}


def usual(name: str, architecture: int) -> bool:
    """The FP8 generation of the data centers' GPUs, and of the FP4 one what has instructions of its own."""
    return architecture == 90 or (architecture == 100 and "fp4" in name)


# The others are compiled by make test-all.
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, architecture, marks=() if usual(name, architecture) else pytest.mark.long)
        for name in CASES
        for architecture in ARCHITECTURES
    ],
)
def test_aot(name: str, architecture: int) -> None:
    made = compiled(name, architecture)
    instructions = architecture >= (89 if version() >= (3, 9) else 90)  # that round to FP8, and are used
    for kernel, code in made.items():
        assert code.cubin[:4] == b"\x7fELF", kernel
        assert re.search(rf"\.target sm_{architecture}", code.ptx)
        assert code.spilled == 0, (kernel, code.registers)
        # Every float operation rounds once, to nearest, and keeps subnormals; an exponential is made of such.
        fused = 2 * (2048 // 128) if kernel == "adamw_kernel" else 0  # two an element, as torch has them
        # sm_100 has instructions of two.
        assert code.count(r"\bfma\.rn\.f32\b") + 2 * code.count(r"\bfma\.rn\.f32x2") == fused, kernel
        assert code.count(r"\bfma\.(?!rn\.f32)") == 0, kernel
        assert not code.count(r"\.ftz|\bex2|sqrt\.approx|div\.full|div\.approx|rcp\.approx"), kernel
        assert not code.count(r"\b(?:add|sub|mul)\.f32"), kernel
        assert not code.count(r"\bdiv\.(?!rn\.f32|[us]\d)"), kernel
        assert not code.count(r"\bcvt\.\w+\.f16\.f32"), "by way of FP16 a value would be rounded twice"
    if "quantize_kernel" in made:
        code = made["quantize_kernel"]
        if "fp8" in name:
            assert bool(code.count(E5M2 if "e5m2" in name else E4M3)) == instructions
        assert code.count(r"ld\.global\S*\.v4\.b32"), "reads are 16 bytes wide"
        if "nvfp4" in name:
            assert bool(code.count(E4M3)) == instructions  # of the blocks' scales
        if "fp4" in name and "bf16" not in name:
            assert bool(code.count(E2M1)) == (architecture >= 100 and "sr" not in name)
    if "quantize_both_kernel" in made:
        assert bool(made["quantize_both_kernel"].count(E4M3)) == instructions
        assert made["quantize_both_kernel"].count(r"ld\.global\S*\.v4\.b32"), "reads are 16 bytes wide"
    if "swiglu_backward_kernel" in made:
        assert bool(made["swiglu_backward_kernel"].count(E5M2 if "e5m2" in name else E4M3)) == instructions


def test_aot_reads_an_operand_once() -> None:
    """One launch where the tiles fit into a block, two where the amax spans more."""
    numbers = {}
    for name, call in CASES.items():
        with recording((9, 0)) as launches:
            call()
        numbers[name] = [launch.kernel.__name__ for launch in launches]
    for name in (
        "fp8 row",
        "fp8 1x128, columns",
        "fp8 128x128",
        "mxfp8",
        "mxfp8, columns",
        "fp8 tensor, e5m2, amax given",
        "fp8 tensor, amax given and noted",
        "mxfp8, as bf16",
        "smooth swiglu to fp8 tensor, amax given",
    ):
        assert numbers[name] == ["quantize_kernel"], name
    for name in ("fp8 tensor", "fp8 row, columns", "nvfp4", "nvfp4, columns, hadamard16, sr"):
        assert numbers[name] == ["amax_kernel", "quantize_kernel"], name
    for name, launches in numbers.items():
        if "rows and columns" in name:
            known = "1x128" in name or "mxfp8" in name or "amax given" in name
            assert launches == [*([] if known else ["amax_kernel"]), "quantize_both_kernel"], name
    assert numbers["smooth swiglu backward to mxfp8"] == ["swiglu_backward_kernel"]


def test_aot_recording_runs_nothing() -> None:
    x = torch.ones(4, 4)
    with recording((9, 0)) as launches:
        CASES["mxfp8"]()
        CASES["swizzle"]()
    assert [launch.programs for launch in launches] == [132 * 16, 8192]  # of 16,384 blocks; of one each
    assert torch.equal(x, torch.ones(4, 4))


def test_aot_a_block_that_32_bits_do_not_span_is_left_to_torch() -> None:
    """Rows that lie 2^24 elements apart: a block of 128 of them is 2^31 long."""
    near, far = (torch.empty_strided((256, 64), (stride, 1), device="meta") for stride in (2**20, 2**25))
    spec = OperandSpec(format=E4M3_FORMAT)
    with recording((9, 0)) as launches:
        quantize_fused(near, spec)
        assert quantize_both(near, spec) is not None
        tile_amax(near, TENSOR)
    assert len(launches) == 5
    with recording((9, 0)) as launches:
        quantize_fused(far, spec)
        assert quantize_both(far, spec) is None
        tile_amax(far, TENSOR)
    assert launches == []
