"""How the package is built (pyproject.toml): a wheel has ``configs/`` within it, a checkout is used in place."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_namespace_packages
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

_CONFIGS = Path("configs")
_PACKAGE = Path("narrowgauge", "trainer")


class BuildPy(build_py):
    """Copies the configs into the package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in self._configs():
                target = Path(self.build_lib, _PACKAGE, file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))

    def get_source_files(self) -> list[str]:
        """For the archive of sources, too."""
        return [*super().get_source_files(), *map(str, self._configs())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(Path(self.build_lib, _PACKAGE, file)) for file in self._configs()]
        return [*super().get_outputs(include_bytecode), *own]

    @staticmethod
    def _configs() -> list[Path]:
        return sorted(_CONFIGS.rglob("*.yaml"))


class EditableWheel(editable_wheel):
    """Puts ``src`` on the path: ``narrowgauge/__init__.py`` finds its rooms there, ``python -m trainer`` its module."""

    def finalize_options(self) -> None:
        self.distribution.package_dir = {"": "src"}
        self.distribution.packages = find_namespace_packages("src", exclude=["*__pycache__*"])
        super().finalize_options()
