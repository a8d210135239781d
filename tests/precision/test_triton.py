"""The Triton backend, as far as a machine without a GPU can tell: in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from precision.backends import choose
from precision.formats import E4M3
from precision.spec import GemmSpec, OperandSpec

HERE = Path(__file__).parent


def python(*arguments: str) -> str:
    """What a Python process prints in which triton interprets its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-W", "ignore:.*encountered in:RuntimeWarning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(900)
def test_every_kernel_gives_the_bits_of_the_reference() -> None:
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::RuntimeWarning", "-x")
    assert "passed" in python("-m", "pytest", *options, str(HERE / "interpreted.py"))


def test_on_a_cpu_it_is_not_chosen() -> None:
    gemm = GemmSpec(a=OperandSpec(format=E4M3))
    assert "triton" not in str(choose(gemm, (None, 8, 8), torch.device("cpu"), "reference"))
