"""What an update rule is: named states of a parameter, and one pure function of them, the gradient and the weight.

A rule is a frozen dataclass that subclasses ``UpdateRule``; its fields are its settings. It knows neither codecs nor
ranks: ``driver`` decodes the states, hands them over, and encodes what comes back. Values are handed in the parameter's
own shape, of which this rank has some rows ([rows, cols]), some elements ([rows]) or, of a stack of matrices
[experts, out, in], some whole matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from .codecs import FP32, Codec

Shape = tuple[int, ...]
WEIGHTS = "master"
"""The name of what the weights themselves are stored in, beside those of a rule's states."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The shape of a state of the full parameter.

    Args:
        shape: of at most three dimensions.
        by_rows: its first dimension is that of the parameter, and is sharded with it. Otherwise every rank has all of
            the state, and must come to the same value of it.
    """

    shape: Shape
    by_rows: bool = True

    def matrix(self, rows: int) -> tuple[int, int]:
        """What a codec sees of it: [rows, cols]. ``rows``: how many of the parameter this rank has."""
        if not self.by_rows and len(self.shape) < 2:  # a row
            return 1, math.prod(self.shape)
        return self.local(rows)[0] if self.shape else 1, math.prod(self.shape[1:])

    def local(self, rows: int) -> Shape:
        """The shape on a rank with so many rows."""
        return (rows, *self.shape[1:]) if self.by_rows and self.shape else self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One state of a parameter. It starts at zero.

    Args:
        name: in ``optim.moments`` and in the mapping that the rule's function gets.
        key: its name in checkpoints; empty: ``name``.
        codec: how it is stored where ``optim.moments`` does not say. States of vectors are stored in FP32 all the same.
        signed: whether values may be negative.
        extent: its shape, by that of the full parameter; None: the parameter's own.
    """

    name: str
    key: str = ""
    codec: Codec = FP32
    signed: bool = True
    extent: Callable[[Shape], Extent] | None = None

    def __post_init__(self) -> None:
        for word in (self.name, self.key or self.name):
            if not word.isidentifier() or word in ("step", "block") or word.startswith(WEIGHTS):
                raise ValueError(f"a state cannot be called {word!r}: a word, not step, block, {WEIGHTS}...")

    @property
    def saved_as(self) -> str:
        return self.key or self.name

    def of(self, shape: Shape) -> Extent:
        return Extent(shape) if self.extent is None else self.extent(shape)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scalars:
    """All else that an update depends on.

    Args:
        lr, decay: of this step; ``decay`` is the coefficient of decoupled weight decay.
        betas, eps: ``optim.beta1``, ``optim.beta2``, ``optim.eps``.
        t: number of this update of the parameter, from 1.
        shape: of the full parameter.
        rows: which of its rows, elements or matrices this rank has.
        plain: no state and no weight is narrow: all are FP32.
        exchanged: what became of that which the rule's ``exchange`` gave; None if it gave nothing.
        noise: for the rule's own draws, where it is ``noisy``: different at each update, by place in the parameter.
    """

    lr: float
    decay: float
    betas: tuple[float, float]
    eps: float
    t: float
    shape: Shape
    rows: slice
    plain: bool = False
    exchanged: Tensor | None = None
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """To be added up over the ranks that share a parameter, in their order: ``value`` has one shape on all of them."""

    value: Tensor


Values = Mapping[str, Tensor]
"""States by name."""


class UpdateRule:
    """The base of update rules; an attribute or a method that a rule leaves out is as here.

    Attributes:
        states: of a parameter that the rule takes; a property, too, where they depend on the rule's settings.
        rest: the rule of the parameters that this one does not take.
        arithmetic: the dtype in which values are handed over. FP32: everything is computed in FP32 and rounded once,
            when it is stored. BF16: every operation rounds.
        noisy: ``update`` draws from ``Scalars.noise``.
        kernels: backends (``reference.Backend``) that compute this very class, in the order of preference, before plain
            torch; what derives from it has none but its own.
    """

    __slots__ = ()
    rest: UpdateRule | None = None
    arithmetic: torch.dtype = torch.float32
    noisy: bool = False
    kernels: tuple[Any, ...] = ()

    def __repr__(self) -> str:  # of a rule that is no dataclass, and so has no settings
        return f"{type(self).__name__}()"

    @property
    def states(self) -> tuple[State, ...]:
        return ()

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def takes(self, name: str, shape: Shape) -> bool:
        """Whether this rule updates the parameter, by its name and full shape; ``rest`` is asked next."""
        return True

    def exchange(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> Tensor | Sum | None:
        """What ranks must exchange before this update, by the arguments of ``update``; None for nothing.

        A tensor with this rank's rows is gathered: ``Scalars.exchanged`` has all rows of the parameter. Of a stack each
        rank has whole matrices: theirs come back as they are. A ``Sum`` is added up. All ranks must ask alike. One
        collective serves as many parameters as it should.
        """
        return None

    def update(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> tuple[Values, Tensor]:
        """The new states by name, and the new weight. A pure function: it changes none of its arguments."""
        raise NotImplementedError

    def intended(self, states: Values, grad: Tensor, weight: Tensor, scalars: Scalars) -> Tensor:
        """The update of the weight, decay included, before anything is rounded to be stored: for the telemetry.

        Left out, it is the change of the weight when all values are FP64.
        """
        wide = {name: value.double() for name, value in states.items()}
        exchanged = None if scalars.exchanged is None else scalars.exchanged.double()
        scalars = replace(scalars, exchanged=exchanged)
        return self.update(wide, grad.double(), weight.double(), scalars)[1] - weight.double()


def chain(rule: UpdateRule) -> Iterator[UpdateRule]:
    """The rule, its ``rest``, and so on."""
    following: UpdateRule | None = rule
    while following is not None:
        yield following
        following = following.rest


def described(rule: object) -> str:
    """What a rule is, the same in every process and version: its name, and the settings that are not as usual."""
    if isinstance(rule, FunctionType):
        return rule.__qualname__
    if isinstance(rule, tuple):
        return f"({', '.join(map(described, rule))})"
    if not is_dataclass(rule) or isinstance(rule, type):
        own = type(rule).__repr__ is not object.__repr__
        return str(rule) if own else type(rule).__name__
    other = [one for one in fields(rule) if _differs(getattr(rule, one.name), one)]
    settings = ", ".join(f"{one.name}={described(getattr(rule, one.name))}" for one in other)
    return f"{type(rule).__name__}({settings})"


def _differs(value: object, setting: Field[Any]) -> bool:
    usual = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return usual is MISSING or described(usual) != described(value)


def rule_of(rule: UpdateRule, name: str, shape: Shape) -> UpdateRule:
    """Which of the chain takes the parameter. Raises ValueError if none does."""
    for one in chain(rule):
        if one.takes(name, shape):
            return one
    raise ValueError(f"{rule.name} does not take {name or 'a parameter'} {list(shape)}, and has no rest that does")
