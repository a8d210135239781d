"""Every Triton kernel compiled for every architecture, without a GPU: instructions, registers, spills."""

from __future__ import annotations

import re

import pytest
import torch

from precision.backends.triton import recording
from precision.backends.triton_aot import ARCHITECTURES, Compiled, cases, compile

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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_aot(name: str, architecture: int) -> None:
    made = compiled(name, architecture)
    for kernel, code in made.items():
        assert code.cubin[:4] == b"\x7fELF", kernel
        assert re.search(rf"\.target sm_{architecture}", code.ptx)
        assert code.spilled == 0, (kernel, code.registers)
        # Every float operation rounds once, to nearest, and keeps subnormals.
        fused = 2 * (2048 // 128) if kernel == "adamw_kernel" else 0  # two an element, as torch has them
        assert code.count(r"\bfma\.") == code.count(r"\bfma\.rn\.f32") == fused, kernel
        assert not code.count(r"\.ftz|sqrt\.approx|div\.full|div\.approx|rcp\.approx"), kernel
        assert not code.count(r"\b(?:add|sub|mul)\.f32"), kernel
        assert not code.count(r"\bdiv\.(?!rn\.f32|[us]\d)"), kernel
    quantizes = made.get("quantize_kernel")
    if quantizes is not None:
        eight = E5M2 if "e5m2" in name else E4M3
        if "fp8" in name:
            assert quantizes.count(eight)
        if "nvfp4" in name:
            assert quantizes.count(E4M3)  # of the blocks' scales
        if "fp4" in name:
            assert bool(quantizes.count(E2M1)) == (architecture >= 100 and "sr" not in name)
        assert quantizes.count(r"ld\.global\S*\.v4\.b32"), "reads are 16 bytes wide"


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
    ):
        assert numbers[name] == ["quantize_kernel"], name
    for name in ("fp8 tensor", "fp8 row, columns", "nvfp4", "nvfp4, columns, hadamard16, sr"):
        assert numbers[name] == ["amax_kernel", "quantize_kernel"], name


def test_aot_recording_runs_nothing() -> None:
    x = torch.ones(4, 4)
    with recording((9, 0)) as launches:
        CASES["mxfp8"]()
        CASES["swizzle"]()
    assert [launch.programs for launch in launches] == [16384, 8192]
    assert torch.equal(x, torch.ones(4, 4))
