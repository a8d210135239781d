"""The script that Hydra's submitit launcher hands to sbatch, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError

try:
    from submitit.slurm.slurm import SlurmExecutor
except ImportError:
    SlurmExecutor = None


def sbatch_script(launcher: Mapping[str, Any], num_jobs: int) -> str:
    """``launcher``: the values of ``hydra.launcher``; ``num_jobs``: of the array that submitit makes of a sweep.

    Raises UserError for another launcher than submitit's for Slurm.
    """
    if SlurmExecutor is None or not str(launcher.get("_target_", "")).endswith(".SlurmLauncher"):
        raise UserError("hydra.launcher.dry_run: only hydra/launcher=narrowgauge and =submitit_slurm have a dry run")

    class Anywhere(SlurmExecutor):
        """Wants no srun, for it submits nothing."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Anywhere(folder=launcher["submitit_folder"], max_num_timeout=launcher["max_num_timeout"])
    others = {"_target_", "submitit_folder", "max_num_timeout"}
    options = {key: value for key, value in launcher.items() if key not in others and value is not None}
    executor.update_parameters(**executor._convert_parameters(options))
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
