"""Every claim about GPUs as a test of its own; the same checks as in ``scripts/gpu_check.py``."""

from __future__ import annotations

import pytest
import torch
from gpu.checks import CHECKS, Check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_claim(check: Check) -> None:
    outcome = check.run()
    if outcome.ok is None:
        pytest.skip(outcome.measured)
    assert outcome.ok, outcome.measured
