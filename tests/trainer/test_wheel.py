"""A wheel holds what a checkout has: every config, every source that is not Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_wheel_has_every_config_and_every_source(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"narrowgauge/trainer/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    files = (file for file in (source / "src").rglob("*") if file.is_file())
    inside = [str(file.relative_to(source / "src")) for file in files if "egg-info" not in str(file)]
    wanted |= {
        name if name.startswith(("hydra_plugins/", "narrowgauge/")) else f"narrowgauge/{name}" for name in inside
    }
    assert wanted - packed == set()
    assert {name.split("/")[0] for name in packed if ".dist-info/" not in name} == {"hydra_plugins", "narrowgauge"}
