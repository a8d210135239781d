"""When in a run something holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A range of steps, its end not included: from 0, or as parts of the run where both bounds are at most 1.

    Args:
        start: a whole step, or a part of the run.
        end: the same; None is the end of the run.

    Raises ValueError for bounds that are no numbers, mixed, negative or the wrong way round.
    """

    start: float = 0
    end: float | None = None

    def __post_init__(self) -> None:
        bounds = [self.start, self.end]
        for bound in bounds if self.end is not None else bounds[:1]:
            if not _is_number(bound) or bound < 0:
                raise ValueError(f"steps={bounds}: {bound!r} is no step and no part of the run")
        if not self.of_run and any(bound != int(bound) for bound in (self.start, self.end or 0)):
            raise ValueError(f"steps={bounds}: either whole steps, or parts of the run from 0 to 1")
        if self.end is not None and self.start >= self.end:
            raise ValueError(f"steps={bounds}: the range is empty")

    @property
    def of_run(self) -> bool:
        """Whether the bounds are parts of the run."""
        return self.end <= 1 if self.end is not None else 0 < self.start < 1

    def steps(self, total_steps: int | None) -> range:
        """The steps themselves. Parts of a run whose length is not known are none."""
        if not self.of_run:
            return range(int(self.start), sys.maxsize if self.end is None else int(self.end))
        if total_steps is None:
            return range(0)
        # A bound that is a whole step but for the last bits of its product with the length is that step.
        return range(
            *(math.ceil(part * total_steps - 1e-9) for part in (self.start, 1 if self.end is None else self.end))
        )

    def meets(self, other: Span, total_steps: int | None) -> bool:
        """Whether a step is in both; of a part of a run and a range of steps, only if the length is known."""
        if self.of_run and other.of_run:
            ends = (1.0 if span.end is None else span.end for span in (self, other))
            return min(ends) - max(self.start, other.start) > 1e-9
        a, b = self.steps(total_steps), other.steps(total_steps)
        return max(a.start, b.start) < min(a.stop, b.stop)

    def __str__(self) -> str:
        if self.of_run:
            return f"from {self.start:g} to {1.0 if self.end is None else self.end:g} of the run"
        return f"from step {self.start:g} on" if self.end is None else f"steps {self.start:g} to {self.end - 1:g}"


def parse_span(value: Any) -> Span:
    """``[start, end]`` of a yaml. Raises ValueError for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"steps={value!r}: a list of two bounds, as [0, 100], [0.8, 1.0] or [100, null]")
    return Span(start=value[0], end=value[1])


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
