"""How a run can end other than well, the exit codes that say so, and errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
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


def reason_of(error: BaseException) -> str:
    """The operating system's word for its error; of another error the message, in one line."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


@contextmanager
def as_user_error(about: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise UserError, ``about`` and the reason, for what is raised within, if it is one of ``kinds``."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{about}{reason_of(error)}") from error


def require_at_least(group: str, config: object, **least: float) -> None:
    """Raises ValueError for a field of ``config`` that is less than it may be; null is not."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= smallest:
            raise ValueError(f"{group}.{name}={value}: must be at least {smallest}")
