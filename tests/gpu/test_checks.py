"""The checks themselves, on a pretended GPU: the first person with a real one should not have to debug them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gpu import checks
from gpu_suite.clock import Timing
from hardware import Hardware, pretend
from narrowgauge.precision.backends import scaled_mm
from narrowgauge.precision.backends.cpu.quantizer import Cpu
from narrowgauge.precision.backends.scaled_mm import ScaledMM
from narrowgauge.precision.loading import names


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "timed", lambda *calls: [call() for call in calls] and Timing(1.0, True))
    monkeypatch.setattr(checks, "LAYER", (160, 160, 160))
    monkeypatch.setattr(checks, "TOKENS", 40)


@pytest.mark.parametrize(
    "name", ["FP8 e4m3, tensor", "FP8 e4m3, 128x128", "NVFP4, 1x16, stochastic", "Hadamard 16, then NVFP4"]
)
def test_kernels_are_compared(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, spec, hadamard = checks.KERNELS[name]
    outcome = checks.check_kernel("reference", spec, hadamard, transposed=True)
    assert outcome.ok
    assert "0 of" in outcome.measured
    original = Cpu.cast
    monkeypatch.setattr(Cpu, "why_not", lambda *arguments: None)
    monkeypatch.setattr(Cpu, "cast", lambda self, x, cast: original(self, 2 * x, cast))
    assert checks.check_kernel("cpu", spec, hadamard, transposed=False).ok is False
    assert checks.check_kernel("none", spec, hadamard, transposed=False).ok is None


@pytest.mark.parametrize("arch", [90, 100])
def test_products_are_compared(small: None, monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    with pretend(monkeypatch, arch) as hardware:
        monkeypatch.setattr(checks, "NATIVE", ScaledMM(detect=lambda device: arch))
        outcomes = {name: checks.check_product(*checks.PRODUCTS[name], ragged=True) for name in checks.PRODUCTS}
        there = {name for name, outcome in outcomes.items() if outcome.ok is not None}
        assert all(outcomes[name].ok for name in there), outcomes
        assert ("MXFP8" in there, "NVFP4" in there, "1x128 x 128x128, FP32 scales" in there) == (
            (False, False, True) if arch == 90 else (True, True, False)
        )
        assert "of BF16's speed" in outcomes["row-wise e4m3 x e4m3"].time
        assert hardware.calls

        def broken(*arguments: object, **more: object) -> torch.Tensor:
            return Hardware(arch)(*arguments, **more) * 1.02  # type: ignore[arg-type]

        monkeypatch.setattr(scaled_mm, "scaled_mm", broken)
        assert checks.check_product(*checks.PRODUCTS["row-wise e4m3 x e4m3"], ragged=False).ok is False


def test_recipes_are_compared(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend(monkeypatch, 100):
        monkeypatch.setattr(checks, "NATIVE", ScaledMM(detect=lambda device: 100))
        outcome = checks.check_recipe("nvfp4")
        assert outcome.ok
        assert outcome.measured.endswith("3 of 3 GEMMs native")
        outcome = checks.check_recipe("fp8_full")
        assert outcome.ok
        assert outcome.measured.endswith("9 of 9 GEMMs native")
    assert checks.check_recipe("nvfp4").ok in (None, True)


def test_every_claim_is_in_the_table() -> None:
    result = subprocess.run(
        [sys.executable, str(checks.ROOT / "scripts" / "gpu_check.py"), "scaled_mm", "recipe", "all_gather"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in checks.PRODUCTS:
        assert f"scaled_mm: {name}" in result.stdout
    for recipe in set(names()) - {"bf16", "fp32"}:
        assert f"recipe: {recipe}" in result.stdout
    if not torch.cuda.is_available():
        assert "not on this machine" in result.stdout
