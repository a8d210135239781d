"""``hydra/launcher=narrowgauge``: every job of a sweep as a process tree of its own."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from narrowgauge.trainer.sweep.grid import LAUNCHER, LauncherConfig
from narrowgauge.trainer.sweep.launch import launch

ConfigStore.instance().store(group="hydra/launcher", name=LAUNCHER, node=LauncherConfig, provider="narrowgauge")


class NarrowgaugeLauncher(Launcher):
    """Hands the jobs to ``trainer.sweep``."""

    def __init__(self, processes: int, jobs: int, dry_run: bool) -> None:
        self._options = LauncherConfig(processes=processes, jobs=jobs, dry_run=dry_run)
        self._config: DictConfig | None = None
        self._flags: Sequence[str] = ()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config
        self._flags = getattr(task_function, "keywords", {}).get("flags", ())  # those of a sweep, for its jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self._config is not None
        return launch(self._config, job_overrides, self._options, self._flags)
