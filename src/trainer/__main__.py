"""``python -m trainer`` and ``torchrun -m trainer``: compose the config, train."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import native
from trainer.kernels import KERNELS
from trainer.lifeline import end_with_launcher, launched_by_torchrun

if __name__ == "__main__":
    end_with_launcher()
    native.begin(*KERNELS)  # compilers work while this process imports torch

import hydra
from hydra._internal.utils import get_args_parser

from trainer.config import CONFIG_DIR, check_flags, load_config
from trainer.environ import check_environment, forgive_console
from trainer.errors import ExitCode, RunFailed, UserError
from trainer.run import run


def main() -> int:
    forgive_console()
    try:
        check_environment()
    except UserError as error:  # said by each process: which of them are ranks is what is not known
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    try:
        check_flags(sys.argv[1:])
        arguments = get_args_parser().parse_args()
        if arguments.multirun:
            return _sweep(arguments.overrides)
        for flag in ("config_name", "config_path", "config_dir", "experimental_rerun"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag.replace('_', '-')} is not used here: configs/train.yaml is the entry config")
        config = load_config(arguments.overrides)
        if arguments.cfg == "job" and not arguments.package:
            print(config.to_yaml(), end="")  # what would be used, with what a run in run.dir brings
            return ExitCode.FINISHED
        if arguments.cfg or arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
            _show()
            return ExitCode.FINISHED
        return run(config)
    except UserError as error:
        return _complain(error)
    except RunFailed as error:  # of this rank: another one may see something else, or nothing any more
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print("interrupted; the newest checkpoint stands", file=sys.stderr)
        return 128 + signal.SIGINT


def _sweep(overrides: list[str]) -> ExitCode:
    if launched_by_torchrun():
        raise UserError(
            "--multirun starts a torchrun for each job: call it as python -m trainer --multirun "
            f"hydra.launcher.processes={os.environ.get('LOCAL_WORLD_SIZE', '2')} {' '.join(overrides)}"
        )
    from trainer.sweep import sweep  # what starts and judges runs; a run itself starts a second faster without

    return sweep(overrides)


@hydra.main(config_path=str(CONFIG_DIR), config_name="train", version_base="1.3")
def _show(config: object) -> None:
    """Hydra itself answers --help, --cfg and --info."""


def _complain(error: UserError) -> int:
    # Once, not once a rank; the others wait, because torchrun ends them all as soon as one has ended.
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    return ExitCode.BAD_INPUT


def _leave(code: int) -> None:
    """End, even where a thread waits for a rank that is gone."""
    waiting = [one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon]
    if waiting and code != ExitCode.FINISHED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
