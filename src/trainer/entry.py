"""The command line of ``python -m narrowgauge``: compose the config, then train, sweep or show."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

from hydra._internal.utils import get_args_parser

from ..precision.loading import make_of
from .config import entry_config, load_config
from .environ import check_environment, forgive_console
from .errors import ExitCode, RunFailed, UserError, one_line
from .lifeline import last_words, launched_by_torchrun
from .overrides import check_flags, for_compose, parse
from .own import Place, hydra_at, split
from .run import run
from .rundir import RunDirectory


def main() -> int:
    forgive_console()
    try:
        check_environment()
    except UserError as error:  # said by each process: which of them are ranks is what is not known
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    try:
        place, rest = split(sys.argv[1:])
        check_flags(rest)
        arguments = get_args_parser().parse_args(rest)
        for flag in ("config_path", "experimental_rerun"):
            if getattr(arguments, flag):
                raise UserError(
                    f"--{flag.replace('_', '-')} is not used here: --config-dir=DIR adds a directory of configs, "
                    "FILE.yaml takes the place of configs/train.yaml"
                )
        given = [*place.flags, *arguments.overrides]
        if arguments.multirun:
            return _sweep(given)
        config = load_config(given)
        if arguments.cfg == "job" and not arguments.package:
            print(config.to_yaml(), end="")  # what would be used, with what a run in run.dir brings
            return ExitCode.FINISHED
        if arguments.cfg or arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
            _show(place, arguments, config.precision.recipe)
            return ExitCode.FINISHED
        _require_own_directory(place, arguments.overrides, config.run.dir)
        code = run(config)
        if code and launched_by_torchrun() and os.environ.get("RANK") == "0":
            last_words(RunDirectory(Path(config.run.dir)).ending() or f"exit code {code}")
        return code
    except UserError as error:
        # Once, not once a rank; the others wait, because torchrun ends them all as soon as one has ended.
        if int(os.environ.get("RANK", "0")) == 0:
            last_words(f"error: {error}")
        else:
            time.sleep(5)
        return ExitCode.BAD_INPUT
    except RunFailed as error:  # of this rank: another one may see something else, or nothing any more
        last_words(f"error: {error}", at_once=True)
        return ExitCode.FAILED
    except Exception as error:
        if launched_by_torchrun():  # whose own lines come after the traceback
            last_words(f"error: {type(error).__name__}: {one_line(error)}")
        raise
    except KeyboardInterrupt:
        print("interrupted; the newest checkpoint stands", file=sys.stderr)
        return 128 + signal.SIGINT


def _sweep(arguments: list[str]) -> ExitCode:
    if launched_by_torchrun():
        raise UserError(
            "--multirun starts a torchrun for each job: call it as python -m narrowgauge --multirun "
            f"hydra.launcher.processes={os.environ.get('LOCAL_WORLD_SIZE', '2')} {shlex.join(arguments)}"
        )
    from .sweep.launch import sweep  # what starts and judges runs; a run itself starts a second faster without

    return sweep(arguments)


def _show(place: Place, arguments: Namespace, recipe: str) -> None:
    """Hydra itself answers --help, --cfg and --info; the docstring of the recipe says what its arguments are."""
    parsed = parse(arguments.overrides)
    name, lines = entry_config(place, parsed), for_compose(parsed)
    with hydra_at(place) as hydra:
        if arguments.help:
            arguments.overrides = lines
            hydra.app_help(config_name=name, args_parser=get_args_parser(), args=arguments)
            about = inspect.getdoc(make_of(recipe)) or "none"
            print(f"precision.args.KEY=VALUE of {recipe} (--cfg job shows the values):\n{about}")
        elif arguments.hydra_help:
            hydra.hydra_help(config_name=name, args_parser=get_args_parser(), args=arguments)
        elif arguments.cfg:
            hydra.show_cfg(name, lines, arguments.cfg, arguments.package, arguments.resolve)
        elif arguments.info:
            hydra.show_info(arguments.info, name, lines)
        else:
            hydra.shell_completion(name, arguments.overrides)


def _require_own_directory(place: Place, overrides: list[str], directory: str) -> None:
    """Raises UserError if a run that starts from another's ``config.yaml`` would go on in the other's directory."""
    named = any(override.partition("=")[0] == "run.dir" for override in overrides)
    run = RunDirectory(Path(directory))
    if place.file is not None and not named and run.has_run() and place.file.resolve() == run.config.resolve():
        raise UserError(
            f"{place.file} has run.dir={directory}, which holds a run: run.dir=... says where the new one goes "
            f"(run.dir={directory} goes on with that one)"
        )


def leave(code: int) -> None:
    """End, even where a thread waits for a rank that is gone."""
    waiting = [one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon]
    if waiting and code != ExitCode.FINISHED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
