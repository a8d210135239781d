"""What a GPU machine without a network needs beside the tree: wheels, token shards, and the name of the revision."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS, EXTRAS, SITE = ".whl", ".gpu", ".site"
LIMIT_BYTES = 64 << 20  # of the tree and the bundle together
#: By need: every command; peers to compare with; the oracles of tests/precision.
NEEDED = ("hydra-core", "omegaconf")
SOURCES = ("antlr4-python3-runtime",)  # published as source alone: built here, pure Python
COMPARED = ("torchao",)
ORACLES = ("gfloat", "more-itertools", "array-api-compat")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def prepare(root: Path = ROOT) -> int:
    """Fill ``.whl`` and ``.gpu`` under ``root`` for Python 3.12 on x86-64, print what they weigh; 1 if too much."""
    wheels, extras = root / WHEELS, root / EXTRAS
    for folder in (wheels, extras):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    fetch(wheels)
    take_shards(root, extras)
    (extras / "revision").write_text(f"{revision(root)}\n{fingerprint(root)}\n", encoding="utf-8")
    return weigh(root)


def fetch(wheels: Path) -> None:
    """Wheels of the versions in constraints.txt, without what they depend on: that machine has the rest."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    tags = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
    for platform in PLATFORMS:
        tags += ["--platform", platform]
    where = str(wheels)
    subprocess.run(
        [*pip, "download", "--no-deps", *tags, "-d", where, *pinned(*NEEDED, *COMPARED, *ORACLES)], check=True
    )
    subprocess.run([*pip, "wheel", "--no-deps", "-w", where, *pinned(*SOURCES)], check=True)


def pinned(*names: str, root: Path = ROOT) -> list[str]:
    """``name==version`` of each, as constraints.txt has it. Raises KeyError for a name that it lacks."""
    lines = (line.strip() for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines())
    pins = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    return [pins[name] for name in names]


def take_shards(root: Path, extras: Path) -> None:
    """The sample's tokenizer and token shards, prepared here if they are not yet."""
    sample = root / "data" / "sample"
    if not (sample / "shards").is_dir():
        subprocess.run([sys.executable, "scripts/prepare_data.py", "data=sample"], cwd=root, check=True)
    for part in ("shards", "tokenizer"):
        shutil.copytree(sample / part, extras / "data" / "sample" / part)


def weigh(root: Path, limit: int = LIMIT_BYTES) -> int:
    """Print bytes of the bundle's files and of all that travels; 1 above ``limit``, else 0."""
    sizes = {
        file: file.stat().st_size for part in (WHEELS, EXTRAS) for file in (root / part).rglob("*") if file.is_file()
    }
    for file, size in sorted(sizes.items()):
        print(f"{size:12,}  {file.relative_to(root)}")
    tree = sum((root / name).stat().st_size for name in travelling(root) if (root / name).is_file())
    whole = tree + sum(sizes.values())
    print(f"tree {tree / 2**20:.1f} MiB + bundle {(whole - tree) / 2**20:.1f} MiB of {limit / 2**20:.0f} MiB")
    if whole > limit:
        print("error: too large to travel", file=sys.stderr)
    return int(whole > limit)


def travelling(root: Path) -> list[str]:
    """Files that git tracks or would: what a copy of the tree holds."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name]


def fingerprint(root: Path) -> str:
    """Of the code as it stands: by it a copy without git knows whether it is still the revision it was named."""
    digest = hashlib.sha256()
    for part in ("src", "scripts", "configs", "tests/gpu"):
        for file in sorted((root / part).rglob("*")):
            if file.suffix in (".py", ".cpp", ".yaml"):
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def revision(root: Path = ROOT) -> str:
    """Of the code that runs: git's word, or, in a copy without git, what ``prepare`` wrote down."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        name, code = (root / EXTRAS / "revision").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return "unknown"
    return name if code == fingerprint(root) else f"{name}, changed since"


def install(root: Path = ROOT) -> str:
    """Where the bundle's packages lie, unpacked if ``hydra`` is not here already; empty if nothing was to be done."""
    site = root / SITE
    if importlib.util.find_spec("hydra") is not None:
        return ""
    if not (site / "hydra").is_dir():
        found = sorted(str(file) for file in (root / WHEELS).glob("*.whl"))
        if not found:
            raise FileNotFoundError("hydra is not installed and .whl is empty: run scripts/gpu_run.py prepare first")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        command += ["--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site), *found]
        subprocess.run(command, check=True)
    return str(site)
