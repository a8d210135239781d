"""What does not hold on some supported versions of a package: tests by name, each with its reason.

``conftest`` expects these tests to fail there (one that passes is an error: its entry has outlived its reason) and
prints them at the end. ``--known-skips`` makes every skip an error that is not for want of hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from packaging.version import Version


@dataclass(frozen=True, slots=True)
class Before:
    """Versions of a package before this one. ``always`` is False where it depends on something else."""

    package: str
    fixed: str
    reason: str
    always: bool = True

    def applies(self) -> bool:
        return Version(version(self.package)) < Version(self.fixed)

    def __str__(self) -> str:
        return f"{self.package} {version(self.package)}: {self.reason}"


RESUME = Before(
    "transformers", "5.18", "where several processes resume on CPUs, its Trainer loads to 'cpu:0': no torch does"
)
SCALED_MM = Before("torch", "2.12", "F.scaled_mm has no kernel for a CPU")
FMA = Before("triton", "3.9", "the interpreter rounds an FMA twice, where a GPU rounds it once")
SPILLS = Before("triton", "3.9", "without FP8 instructions on Ada two directions of a large tile spill some registers")

FAILS = {
    "tests/precision/test_callback.py::test_two_processes_train_one_model[resumed]": RESUME,
    "tests/precision/test_callback.py::test_two_processes_resume_with_amaxes_of_their_own": RESUME,
    "tests/precision/test_scaled_mm.py::test_the_cpu_multiplies_what_it_takes_alike": SCALED_MM,
    "tests/precision/interpreted.py::test_adamw_over_narrow_states": FMA,
    "tests/precision/interpreted.py::test_updates_are_those_of_plain_torch": FMA,
    "tests/precision/test_triton_aot.py::test_aot[fp8 1x128, rows and columns-89]": SPILLS,
    "tests/precision/test_triton_aot.py::test_aot[fp8 1x128, rows and columns, scales by column-89]": SPILLS,
}
"""By node; without brackets all of a test's parameters."""

HARDWARE = (
    "the model is on cpu",  # kernels of a GPU
    "no NVIDIA GPU on this machine",
    "not on this machine:",
    "chromium is not installed",
    "network namespaces need root",
    "no compiler, or a CPU without AVX512_BF16",
)
"""How the reasons of skips begin that no version can mend."""


def fails(node: str) -> Before | None:
    """Why a test cannot hold here, if so."""
    found = FAILS.get(node) or FAILS.get(node.partition("[")[0])
    return found if found is not None and found.applies() else None
