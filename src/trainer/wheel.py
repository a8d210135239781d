"""A wheel has ``configs/`` within the package ``trainer``: the build backend's part, which pyproject.toml names."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

_CONFIGS = Path("configs")


class BuildPy(build_py):
    """Copies the configs beside the modules; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in self._configs():
                target = Path(self.build_lib, "trainer", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))

    def get_source_files(self) -> list[str]:
        """For the archive of sources, too."""
        return [*super().get_source_files(), *map(str, self._configs())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(Path(self.build_lib, "trainer", file)) for file in self._configs()]
        return [*super().get_outputs(include_bytecode), *own]

    @staticmethod
    def _configs() -> list[Path]:
        return sorted(_CONFIGS.rglob("*.yaml"))
