"""How a run can end other than well, and the exit codes that say so."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``python -m narrowgauge`` (torchrun turns every code but 0 into 1)."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    DIVERGED = 3
    STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after a checkpoint; the same command goes on


class RunFailed(Exception):
    """What ended a run that was neither the user's mistake nor ours: another rank, a machine, its memory.

    The message is one line.
    """


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the nearest valid choice."""


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, never empty."""
    return " ".join(str(error).split()) or type(error).__name__
