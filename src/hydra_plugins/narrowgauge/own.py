"""``own://DIRECTORY``: configs of the user's, each checked before Hydra makes anything of it."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult

from narrowgauge.trainer.config import check_own
from narrowgauge.trainer.own import EXPERIMENT, SCHEME


class OwnConfigSource(FileConfigSource):
    """Files of ``--config-dir``."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        group = config_path.rpartition("/")[0]
        package = check_own(Path(self.path) / self._normalize_file_name(config_path), group)
        result = super().load_config(config_path)
        if group == EXPERIMENT and package is None:  # what an experiment is for
            result.header["package"] = "_global_"
        return result
